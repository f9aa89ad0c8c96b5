"""Make the bridge's TLS key and certificate. The key stays in a volume of the bridge's own; the certificate goes where
Alertmanager and Prometheus find it, as what they check the bridge by. Made anew a month before it runs out.
"""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

OWN, SHOWN = Path("/var/lib/bridge/own"), Path("/var/lib/bridge/shown")
LASTS, RENEW_BEFORE = timedelta(days=365), timedelta(days=30)


def good_until(certificate: Path) -> datetime:
    """When the certificate runs out; long ago where there is none."""
    if not certificate.exists():
        return datetime.min.replace(tzinfo=UTC)
    return x509.load_pem_x509_certificate(certificate.read_bytes()).not_valid_after_utc


def main() -> None:
    """Make both, unless they are there and last."""
    now = datetime.now(UTC)
    if (OWN / "key.pem").exists() and good_until(SHOWN / "cert.pem") - now > RENEW_BEFORE:
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
    os.umask(0o077)
    (OWN / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (SHOWN / "cert.pem").write_bytes(made.public_bytes(Encoding.PEM))
    (SHOWN / "cert.pem").chmod(0o644)
    print("made a certificate for the bridge")


if __name__ == "__main__":
    main()
