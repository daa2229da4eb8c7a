-- What people said: labels are only ever appended; `current` shows those that count.
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS pair (
    id TEXT PRIMARY KEY, position INTEGER, row TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS label (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, request TEXT NOT NULL UNIQUE,
    pair TEXT NOT NULL REFERENCES pair(id), labeller TEXT NOT NULL, adjudicates INTEGER NOT NULL,
    choice TEXT NOT NULL CHECK (choice IN ('a', 'b', 'tie', 'bad', 'skip', 'undo')),
    shown_left TEXT NOT NULL CHECK (shown_left IN ('a', 'b')), informed INTEGER NOT NULL,
    seconds REAL NOT NULL, comment TEXT NOT NULL, at TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS demonstration (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, request TEXT NOT NULL UNIQUE,
    pair TEXT NOT NULL REFERENCES pair(id), labeller TEXT NOT NULL, started_from TEXT NOT NULL,
    completion TEXT NOT NULL, verdict TEXT, seconds REAL NOT NULL, at TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS verdict_seen (
    pair TEXT NOT NULL, labeller TEXT NOT NULL, PRIMARY KEY (pair, labeller));
CREATE TABLE IF NOT EXISTS lease (
    pair TEXT NOT NULL, labeller TEXT NOT NULL, tab TEXT NOT NULL, until REAL NOT NULL,
    PRIMARY KEY (labeller, tab));
CREATE INDEX IF NOT EXISTS queue ON pair (position);
CREATE INDEX IF NOT EXISTS label_of ON label (pair, labeller, adjudicates, seq);
CREATE INDEX IF NOT EXISTS lease_of ON lease (pair);
CREATE TRIGGER IF NOT EXISTS label_kept BEFORE DELETE ON label
    BEGIN SELECT RAISE(ABORT, 'labels are append-only'); END;
CREATE TRIGGER IF NOT EXISTS label_fixed BEFORE UPDATE ON label
    BEGIN SELECT RAISE(ABORT, 'labels are append-only'); END;
CREATE VIEW IF NOT EXISTS current AS SELECT * FROM label l WHERE choice <> 'undo' AND NOT EXISTS (
    SELECT 1 FROM label n WHERE n.pair = l.pair AND n.labeller = l.labeller
    AND n.adjudicates = l.adjudicates AND n.seq > l.seq);
