"""The ledger's schema: SQL text and what can be read from it, nothing else. Level 3.

Written for a catalogue that is attached as `ledger` and in use, so that names need no prefix and a team's shared catalogue can
take the file's place. Rules that hold for every table:

* Rows are immutable: they are added, never changed. No primary keys and no secondary indexes (DuckDB has returned wrong rows from
  one after a crash), so a row may be there twice, and every view counts it once.
* A digest (of a key, a model, …) is a UUID: 128 bits fit exactly, and ``WHERE key = '<32 hex digits>'`` works. Never a BLOB.
* Times are UTC. Seconds are measured wall seconds; NULL means not measured, and is never counted as zero.
* What came through a store's journal carries ``store`` and ``seq`` (and ``n`` for its place in the event): its identity.

The comment behind a column is the column's documentation: `comments` turns it into ``COMMENT ON``, and
``SELECT table_name, column_name, comment FROM duckdb_columns() WHERE database_name = 'ledger'`` shows it to whoever asks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from evalcache.auditviews import VIEWS

_TABLES_1 = """
CREATE TABLE schema_version ( -- Steps of this schema that were applied; the highest number counts.
    version INTEGER, -- number of the step
    applied_at TIMESTAMP -- when
);
CREATE TABLE synced ( -- How far each store's journal has been taken in; committed together with what was taken in.
    store VARCHAR, -- id of the store
    last_seq BIGINT, -- number of the last event; the highest row counts
    synced_at TIMESTAMP -- when
);
CREATE TABLE models ( -- One row per model, by the bytes of its weights, attributes and code.
    digest UUID, -- manifest root
    class VARCHAR, -- class of the outermost module
    config JSON, -- configuration, where it was recorded
    parent UUID, -- model that this one was made from, where it was recorded
    adapter VARCHAR, -- active adapters
    quantisation VARCHAR, -- method of quantisation
    parameters BIGINT, -- number of parameters
    bytes BIGINT, -- bytes of all distinct tensors
    modules INTEGER, -- number of modules
    manifest BLOB, -- the whole manifest, as the store keeps it
    first_seen TIMESTAMP -- when the ledger first heard of it
);
CREATE TABLE model_names ( -- Under which names and roles runs met a model.
    store VARCHAR, -- store of the event
    seq BIGINT, -- number of the event
    run VARCHAR, -- id of the run
    model UUID, -- manifest root
    name VARCHAR, -- as the caller named it
    role VARCHAR -- candidate, judge, …; empty where there is one model
);
CREATE TABLE modules ( -- One row per module of a model. Equal digests compute the same function, in whatever model.
    model UUID, -- manifest root
    path VARCHAR, -- path in the model; the outermost module's is empty
    digest UUID, -- over class, code, attributes, tensors and children
    class VARCHAR, -- its class
    tensors INTEGER, -- tensors that it owns itself, children's not included
    bytes BIGINT, -- bytes of these
    own UUID, -- digest over class, code, attributes and these tensors: what it is without its children
    weights UUID -- digest over these tensors alone
);
CREATE TABLE fields ( -- Settings and environments in the canonical bytes that are keyed: JSON cannot hold them exactly.
    digest UUID, -- of the bytes
    canonical BLOB -- deterministic CBOR
);
CREATE TABLE requests ( -- What was asked: one row per key.
    key UUID, -- key of the whole action
    request UUID, -- digest of kind, settings, prompt and inputs: equal for two models that are asked the same thing
    prompt UUID, -- digest of kind, prompt and inputs alone: equal for requests that differ in their settings
    kind VARCHAR, -- generate, loglikelihood, …
    model UUID, -- manifest root
    settings_digest UUID, -- effective settings
    settings JSON, -- the same, to be read
    environment_digest UUID, -- keyed environment
    environment JSON, -- the same, to be read
    prompt_token_ids INTEGER[], -- input ids where the mask is 1
    inputs JSON, -- further inputs of the row, to be read
    inputs_canonical BLOB -- the same, exactly; NULL where there are none
);
CREATE TABLE outputs ( -- What was answered: one row each time that a key was computed.
    key UUID, -- key of the whole action
    text VARCHAR, -- where a client was asked for text
    token_ids INTEGER[], -- new tokens up to the row's own end
    logprobs DOUBLE[], -- of each scored token; NULL within stands for not a number
    scalars JSON, -- named values (sum, is_greedy, …)
    finish_reason VARCHAR, -- stop, length, or NULL where the question does not arise
    prompt_tokens INTEGER, -- tokens read
    completion_tokens INTEGER, -- tokens made
    seconds DOUBLE, -- this row's share of its batch's busy seconds
    device VARCHAR, -- name of the device that was busy
    batch_size INTEGER, -- rows computed together
    dtype VARCHAR, -- of the computation
    recorded JSON, -- unkeyed facts of the environment
    run VARCHAR, -- run that computed it
    created_at TIMESTAMP, -- when it was stored
    exact BLOB, -- scalars and recorded facts in canonical CBOR; NULL where there are none
    arrays BLOB -- named tensors in canonical CBOR; NULL where there are none, or too large: the store alone has those
);
CREATE TABLE runs ( -- One row per process that began a run; all processes of a launch share the run's id.
    store VARCHAR, -- store of the event
    seq BIGINT, -- number of the event
    run VARCHAR, -- id of the run
    started_at TIMESTAMP, -- when
    command VARCHAR, -- as it was typed
    client VARCHAR, -- eval framework, empty for a plain script
    client_version VARCHAR, -- its version
    versions JSON, -- package → version
    git_commit VARCHAR, -- of the caller's checkout
    host VARCHAR, -- name of the machine
    policy VARCHAR, -- use, refresh, read_only, replay
    match VARCHAR -- portable or strict
);
CREATE TABLE run_tags ( -- The user's own words for a run (evalcache run --tag); one row per tag and process.
    store VARCHAR, -- store of the event
    seq BIGINT, -- number of the event
    run VARCHAR, -- id of the run
    tag VARCHAR -- as it was typed
);
CREATE TABLE run_ends ( -- One row per process that ended; a run without one is still going on, or was killed.
    store VARCHAR, -- store of the event
    seq BIGINT, -- number of the event
    run VARCHAR, -- id of the run
    ended_at TIMESTAMP, -- when
    status VARCHAR, -- ok, failed or interrupted
    exit_code INTEGER -- of the process, where it is known
);
CREATE TABLE lookups ( -- One row per request of a run, and what became of it.
    store VARCHAR, -- store of the event
    seq BIGINT, -- number of the event
    n INTEGER, -- place in the event
    run VARCHAR, -- id of the run
    asked_at TIMESTAMP, -- when the call was made
    key UUID, -- NULL where there was none (uncacheable)
    model UUID, -- manifest root; NULL where the model could not be hashed
    client VARCHAR, -- eval framework
    role VARCHAR, -- of the model in the run
    task VARCHAR, -- of the eval
    document VARCHAR, -- of the task
    outcome VARCHAR, -- hit, miss, uncacheable or duplicate (merged with an equal request of the run)
    reason VARCHAR, -- of a miss or an uncacheable; own: a hit whose entry this very run computed, which is no saving
    detail VARCHAR, -- what exactly
    seconds DOUBLE, -- credited to a hit or a duplicate (what its entry cost), spent by a miss or an uncacheable
    device VARCHAR, -- where the seconds were measured; NULL where that is not known
    origin VARCHAR -- of a hit or its duplicates: the run that computed the entry
);
CREATE TABLE overheads ( -- Seconds that evalcache itself took.
    store VARCHAR, -- store of the event
    seq BIGINT, -- number of the event
    run VARCHAR, -- id of the run
    reported_at TIMESTAMP, -- when it was reported
    kind VARCHAR, -- start, fingerprint, probe, checks, keys, lookup, decode, write, sync, last_sync (the one at the end)
    seconds DOUBLE -- since the report before
);
CREATE TABLE measurements ( -- What processes of a run saw of their devices.
    store VARCHAR, -- store of the event
    seq BIGINT, -- number of the event
    run VARCHAR, -- id of the run
    measured_at TIMESTAMP, -- when
    device VARCHAR, -- its name, as in outputs
    device_count INTEGER, -- how many of them the process used
    peak_bytes BIGINT, -- the most memory that was in use on one of them; NULL where nobody counted
    energy_joules DOUBLE -- that they took since the report before, by their own meters; NULL where there is none
);
CREATE TABLE model_loads ( -- Weights that were loaded; a run without a row left its models asleep.
    store VARCHAR, -- store of the event
    seq BIGINT, -- number of the event
    run VARCHAR, -- id of the run
    model UUID, -- manifest root
    seconds DOUBLE -- that it took
);
CREATE TABLE tasks ( -- What an eval is about; filled by the adapters of eval frameworks.
    client VARCHAR, -- eval framework
    task VARCHAR, -- its name
    version VARCHAR, -- of its definition
    settings JSON -- shots, template, split, …; a task is there once for each version and settings
);
CREATE TABLE documents ( -- One row per document of a task and content; filled likewise.
    client VARCHAR, -- eval framework
    task VARCHAR, -- its task
    document VARCHAR, -- its name within the task
    digest UUID, -- over its content
    content JSON -- question, choices, target; NULL where it was too large
);
CREATE TABLE scores ( -- What an answer was worth; filled likewise.
    store VARCHAR, -- store of the event
    seq BIGINT, -- number of the event
    n INTEGER, -- place in the event
    run VARCHAR, -- id of the run
    request UUID, -- as in requests; NULL where it is not known
    client VARCHAR, -- eval framework
    task VARCHAR, -- its task
    document VARCHAR, -- its document
    role VARCHAR, -- of the model
    metric VARCHAR, -- acc, exact_match, …
    value DOUBLE, -- the score; NULL where it was not finite
    cluster VARCHAR -- documents that belong together, for standard errors; NULL for a document by itself
);
"""

_VIEWS_1 = """
-- The newest answer to each request.
CREATE VIEW answers AS
SELECT r.* EXCLUDE (inputs_canonical), o.* EXCLUDE (key, exact, arrays)
FROM (SELECT * FROM requests QUALIFY row_number() OVER (PARTITION BY key) = 1) r
JOIN (SELECT * FROM outputs QUALIFY row_number() OVER (PARTITION BY key ORDER BY created_at DESC, run) = 1) o USING (key);

-- Each model once, with the place at which the ledger met it: pairs of models are shown elder first, and once.
CREATE VIEW models_in_order AS
SELECT m.* EXCLUDE (manifest), n.names, row_number() OVER (ORDER BY m.first_seen, m.digest) AS place
FROM (SELECT * FROM models QUALIFY row_number() OVER (PARTITION BY digest ORDER BY first_seen) = 1) m
LEFT JOIN (SELECT model AS digest, list(DISTINCT name ORDER BY name) AS names FROM model_names GROUP BY model) n USING (digest);

-- The same request apart from the model: each pair of answers once, the model that was met first on the left.
CREATE VIEW outputs_side_by_side AS
SELECT a.kind, ma.names AS names_a, mb.names AS names_b,
    a.token_ids = b.token_ids AND a.text IS NOT DISTINCT FROM b.text AND a.scalars::VARCHAR = b.scalars::VARCHAR AS same,
    a.text AS text_a, b.text AS text_b, a.token_ids AS token_ids_a, b.token_ids AS token_ids_b,
    a.scalars AS scalars_a, b.scalars AS scalars_b, a.finish_reason AS finish_reason_a, b.finish_reason AS finish_reason_b,
    a.seconds AS seconds_a, b.seconds AS seconds_b,
    a.environment_digest = b.environment_digest AS same_environment, a.prompt_token_ids,
    a.model AS model_a, b.model AS model_b, a.key AS key_a, b.key AS key_b
FROM answers a JOIN answers b USING (request)
JOIN models_in_order ma ON ma.digest = a.model JOIN models_in_order mb ON mb.digest = b.model
WHERE ma.place < mb.place;

-- Modules that two models have in common, wherever they stand in them. bytes: of one copy, children not included.
CREATE VIEW modules_shared AS
WITH held AS (
    SELECT model, digest, any_value(class) AS class, any_value(bytes) AS bytes, list(DISTINCT path ORDER BY path) AS paths
    FROM modules GROUP BY model, digest
)
SELECT ma.names AS names_a, mb.names AS names_b, a.class, a.bytes, a.paths AS paths_a, b.paths AS paths_b,
    digest, a.model AS model_a, b.model AS model_b
FROM held a JOIN held b USING (digest)
JOIN models_in_order ma ON ma.digest = a.model JOIN models_in_order mb ON mb.digest = b.model
WHERE ma.place < mb.place;

-- Why requests could not be cached. Meanings of the reasons: README.
CREATE VIEW uncacheable_by_reason AS
SELECT run, reason, count(*) AS requests, sum(seconds) AS seconds, min(detail) AS example
FROM (SELECT DISTINCT ON (store, seq, n) * FROM lookups) WHERE outcome = 'uncacheable'
GROUP BY run, reason ORDER BY run, requests DESC, reason;

-- What each document scored in a run, once: several tries (epochs, repeats) count as one with their mean.
CREATE VIEW scores_by_document AS
SELECT run, client, task, role, metric, document, min(cluster) AS cluster, avg(value) AS value, count(value) AS tries
FROM (SELECT DISTINCT ON (store, seq, n) * FROM scores)
GROUP BY run, client, task, role, metric, document, CASE WHEN document = '' THEN (store, seq, n) END;

-- The mean over a task's documents in a run. standard_error: of the mean, by clusters; a document without one is its own, so that
-- without any this is the standard deviation over the root of the number of documents. unscored: documents whose value is NULL.
-- Source: Miller 2024, Adding error bars to evals (arXiv 2411.00640), its variance times C / (C − 1) for C clusters.
CREATE VIEW scores_by_run AS
WITH each AS (
    SELECT *, CASE WHEN cluster IS NULL THEN row_number() OVER () END AS alone,
        avg(value) OVER (PARTITION BY run, client, task, role, metric) AS mean
    FROM scores_by_document
), clusters AS (
    SELECT run, client, task, role, metric, mean, count(value) AS documents, count(*) - count(value) AS unscored,
        sum(value - mean) AS deviation, cluster IS NOT NULL AS clustered
    FROM each GROUP BY run, client, task, role, metric, mean, cluster, alone
)
SELECT run, client, task, role, metric, sum(documents)::BIGINT AS documents, any_value(mean) AS mean,
    CASE WHEN count(deviation) > 1 THEN
        sqrt(sum(deviation * deviation) * count(deviation) / (count(deviation) - 1)) / sum(documents) END AS standard_error,
    nullif(count(deviation) FILTER (clustered), 0) AS clusters, sum(unscored)::BIGINT AS unscored
FROM clusters GROUP BY run, client, task, role, metric ORDER BY run, client, task, role, metric;

-- What the same document scored in two runs: each pair once, the run that began first on the left. models and names: whom the
-- run asked in that role, where its lookups tell.
CREATE VIEW scores_side_by_side AS
WITH began AS (
    SELECT run, row_number() OVER (ORDER BY min(started_at) NULLS LAST, run) AS place
    FROM (SELECT DISTINCT run FROM scores) LEFT JOIN runs USING (run) GROUP BY run
), asked AS (
    SELECT run, l.role, list(DISTINCT model ORDER BY model) AS models, list(DISTINCT n.name ORDER BY n.name) AS names
    FROM (SELECT DISTINCT run, role, model FROM lookups WHERE model IS NOT NULL) l LEFT JOIN model_names n USING (run, model)
    GROUP BY run, l.role
), told AS (
    SELECT * FROM scores_by_document JOIN began USING (run) LEFT JOIN asked USING (run, role) WHERE document <> ''
)
SELECT client, task, role, metric, document, a.value AS value_a, b.value AS value_b, b.value - a.value AS difference,
    a.names AS names_a, b.names AS names_b, a.models AS models_a, b.models AS models_b, a.run AS run_a, b.run AS run_b
FROM told a JOIN told b USING (client, task, role, metric, document)
WHERE a.place < b.place;
"""

_STEP_2 = """
ALTER TABLE outputs ADD COLUMN answer UUID; -- digest of the answer, apart from what it cost; NULL where an elder version told
CREATE TABLE removals ( -- Entries that left the store, and that came back: of each key, the row with the highest place counts.
    store VARCHAR, -- store of the event
    seq BIGINT, -- number of the event
    place BIGINT, -- order in which the ledger heard of it, from whatever store
    key UUID, -- of the entry
    why VARCHAR, -- pruned, evicted (among the cheapest beyond a size limit), lost (damaged beyond repair), stored (again)
    run VARCHAR, -- that did it, where it was a run
    removed_at TIMESTAMP -- when
);

-- Entries that are no longer in the store, and are not to be brought back.
CREATE VIEW entries_gone AS
SELECT key, arg_max(why, place) AS why, arg_max(run, place) AS run, arg_max(removed_at, place) AS removed_at
FROM removals GROUP BY key HAVING arg_max(why, place) <> 'stored';

-- The newest answer to each request.
CREATE OR REPLACE VIEW answers AS
SELECT r.* EXCLUDE (inputs_canonical), o.* EXCLUDE (key, exact, arrays, answer)
FROM (SELECT * FROM requests QUALIFY row_number() OVER (PARTITION BY key) = 1) r
JOIN (SELECT * FROM outputs QUALIFY row_number() OVER (PARTITION BY key ORDER BY created_at DESC, run) = 1) o USING (key);
"""

_STEP_3 = """
CREATE TABLE resumptions ( -- Forwards that began above a model's first layer, by what another model had left there.
    store VARCHAR, -- store of the event
    seq BIGINT, -- number of the event
    run VARCHAR, -- id of the run
    resumed_at TIMESTAMP, -- when
    model UUID, -- manifest root
    depth INTEGER, -- after how many layers they began
    layers INTEGER, -- how many there are
    row_count BIGINT, -- rows of their batches
    seconds DOUBLE, -- that the layers below take, as last measured on the device, less the reading of states
    device VARCHAR, -- that computed the rest
    why VARCHAR -- NULL where all was well, else what was seen that switched it off
);

-- What each run was spared below the first changed layer; part of no other figure. layers_share: of all layers, by rows.
CREATE VIEW components_by_run AS
SELECT run, sum(row_count)::BIGINT AS row_count, sum(seconds) AS seconds,
    sum(row_count * depth / layers) / sum(row_count) AS layers_share
FROM (SELECT DISTINCT ON (store, seq) * FROM resumptions) WHERE why IS NULL GROUP BY run;
"""

STEPS: tuple[str, ...] = (_TABLES_1 + _VIEWS_1 + VIEWS, _STEP_2, _STEP_3)
"""Step *n* is ``STEPS[n - 1]``. A step is never edited once released; a change is a new step."""

VERSION = len(STEPS)

_TABLE = re.compile(r"CREATE TABLE (\w+) \( -- (.+)\n((?:    .+\n)+)\);")
_COLUMN = re.compile(r"    (\w+) ([A-Z]+(?:\[\])?),? -- (.+)\n")
_ADDED = re.compile(r"ALTER TABLE (\w+) ADD COLUMN (\w+) ([A-Z]+(?:\[\])?); -- (.+)\n")


def columns() -> dict[str, dict[str, str]]:
    """Table → column → SQL type, as all steps together create them."""
    found: dict[str, dict[str, str]] = {}
    for step in STEPS:
        for table, _, body in _TABLE.findall(step):
            found[table] = {name: kind for name, kind, _ in _COLUMN.findall(body)}
        for table, name, kind, _ in _ADDED.findall(step):
            found[table][name] = kind
    return found


def comments(step: str) -> Iterator[str]:
    """``COMMENT ON`` statements for the tables and columns of a step."""
    for table, about, body in _TABLE.findall(step):
        yield f"COMMENT ON TABLE {table} IS {quoted(about)}"
        for column, _, said in _COLUMN.findall(body):
            yield f"COMMENT ON COLUMN {table}.{column} IS {quoted(said)}"
    for table, column, _, said in _ADDED.findall(step):
        yield f"COMMENT ON COLUMN {table}.{column} IS {quoted(said)}"


def quoted(text: str) -> str:
    """``text`` as an SQL literal, for the places that take no parameters."""
    return "'" + text.replace("'", "''") + "'"


def literal(value: str | int | float | None) -> str:
    """A value as an SQL literal; SQL's text cannot hold the sign NUL."""
    if isinstance(value, str):
        return f"({' || chr(0) || '.join(map(quoted, value.split(chr(0))))})"
    return "NULL" if value is None else repr(value)
