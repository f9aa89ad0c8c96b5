"""Make the bridge's TLS key and certificate: ``bridge_init.py OWN SHOWN``. The key stays in a volume of the bridge's
own; the certificate goes where Alertmanager and Prometheus find it, as what they check the bridge by. Made anew in its
last year, and where the two cannot be used.
"""

import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

LASTS, RENEW_BEFORE = timedelta(days=3650), timedelta(days=365)


def good_until(key: Path, certificate: Path) -> datetime:
    """When the certificate runs out; long ago where either is not there, is cut short or is not the other's."""
    never = datetime.min.replace(tzinfo=UTC)
    try:
        own = load_pem_private_key(key.read_bytes(), None).public_key()
        shown = x509.load_pem_x509_certificate(certificate.read_bytes())
    except (FileNotFoundError, ValueError):
        return never
    return shown.not_valid_after_utc if shown.public_key() == own else never


def write(path: Path, data: bytes, mode: int) -> None:
    """Write a file whole: to a temporary name, then renamed."""
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    part.touch(0o600)
    part.write_bytes(data)
    part.chmod(mode)
    part.replace(path)


def main() -> None:
    """Make both, unless they are there and last."""
    key_file, certificate_file = Path(sys.argv[1], "key.pem"), Path(sys.argv[2], "cert.pem")
    now = datetime.now(UTC)
    if good_until(key_file, certificate_file) - now > RENEW_BEFORE:
        print("the certificate is there")
        return
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "bridge")])
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + LASTS)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("bridge")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    write(key_file, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), 0o600)
    write(certificate_file, made.public_bytes(Encoding.PEM), 0o644)
    print("made a certificate for the bridge")


if __name__ == "__main__":
    main()
