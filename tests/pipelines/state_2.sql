-- A state store as Ballast left it while its schema was 2.
BEGIN TRANSACTION;
CREATE TABLE ballast_schema (
	version INTEGER NOT NULL, 
	PRIMARY KEY (version)
);
INSERT INTO "ballast_schema" VALUES(1);
INSERT INTO "ballast_schema" VALUES(2);
CREATE TABLE decisions (
	record_sha256 VARCHAR(64) NOT NULL, 
	version INTEGER NOT NULL, 
	verdict TEXT NOT NULL, 
	summary TEXT NOT NULL, 
	as_of TEXT NOT NULL, 
	decided_at TEXT NOT NULL, data TEXT, 
	PRIMARY KEY (record_sha256)
);
INSERT INTO "decisions" VALUES('aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa',1,'promote','PROMOTE · first model','2013-04-01','2026-11-01T10:00:00.000+00:00',NULL);
INSERT INTO "decisions" VALUES('bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb',2,'refuse','REFUSE · not better','2013-05-01','2026-11-02T10:00:00.000+00:00',NULL);
INSERT INTO "decisions" VALUES('dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd',4,'refuse','REFUSE · not better','2013-06-01','2026-11-03T10:00:00.000+00:00','5e.dir');
CREATE TABLE ledger (
	seq INTEGER NOT NULL, 
	prev_hash VARCHAR(64) NOT NULL, 
	hash VARCHAR(64) NOT NULL, 
	at TEXT NOT NULL, 
	as_of TEXT, 
	kind TEXT NOT NULL, 
	from_version INTEGER, 
	to_version INTEGER, 
	reason TEXT NOT NULL, 
	actor TEXT NOT NULL, 
	record_sha256 VARCHAR(64), 
	PRIMARY KEY (seq), 
	UNIQUE (prev_hash), 
	UNIQUE (hash)
);
INSERT INTO "ledger" VALUES(1,'0000000000000000000000000000000000000000000000000000000000000000','5e7b18eb57ed99ab2e0ec033a8e664e3c312a3596b00229e249607562953de76','2026-11-21T05:14:30.589+00:00','2013-04-01','promote',NULL,1,'PROMOTE · first model','retrain_scheduled/turn__2013-04-01','aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa');
INSERT INTO "ledger" VALUES(2,'5e7b18eb57ed99ab2e0ec033a8e664e3c312a3596b00229e249607562953de76','cb97a1e2549c2a28d45800990e4ee189a63c21a414692f204481450cbe11e3b8','2026-11-21T05:14:30.612+00:00','2013-04-01','promote',1,3,'PROMOTE · better by 0.021','retrain_scheduled/turn__2013-04-01','cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc');
INSERT INTO "ledger" VALUES(3,'cb97a1e2549c2a28d45800990e4ee189a63c21a414692f204481450cbe11e3b8','48c5c7689d3e4c7a67df724610050cba4fe56a50fcdf6273e6a02bae8198c897','2026-11-21T05:14:30.644+00:00','2013-04-01','rollback',3,1,'it''s worse: “odd” numbers','ana',NULL);
INSERT INTO "ledger" VALUES(4,'48c5c7689d3e4c7a67df724610050cba4fe56a50fcdf6273e6a02bae8198c897','a621f3edff8ed0e62a3b4d95613f2b91f3a0f638cd0a18dcfb267b84e6fcb25f','2026-11-21T12:52:44.142+00:00','2013-05-01','freeze',1,1,'peak season','ana',NULL);
CREATE TABLE settings (
	name VARCHAR(64) NOT NULL, 
	value TEXT, 
	PRIMARY KEY (name)
);
INSERT INTO "settings" VALUES('clock','2013-05-01');
INSERT INTO "settings" VALUES('projected','48c5c7689d3e4c7a67df724610050cba4fe56a50fcdf6273e6a02bae8198c897');
COMMIT;
