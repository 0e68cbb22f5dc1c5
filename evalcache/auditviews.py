"""The views behind every figure of an audit: SQL text, a part of the ledger's schema. Level 2.9.

What they mean, so that anybody can check a report:

* A request stands on one *line* alone: ``credited`` (a hit on what an earlier run of this ledger computed), ``imported`` (a hit
  on what was computed by a run that this ledger does not know: another store's, or its ledger was lost), ``duplicate`` (merged
  with an equal request of its run, or a hit on what its own run computed), ``spent`` (a miss or an uncacheable).
* net = credited + imported − overhead. Duplicates, and loads that were avoided, are never in it.
* Overhead is measured for a run; each of its requests bears an equal share, so that shares add up to what was measured.
"""

from __future__ import annotations

SUMS = """count(outcome) AS requests, count(*) FILTER (outcome = 'hit') AS hits,
    count(*) FILTER (reason = 'own') AS own_hits, count(*) FILTER (line = 'imported') AS imported_hits,
    count(*) FILTER (outcome = 'miss') AS misses, count(*) FILTER (outcome = 'uncacheable') AS uncacheable,
    count(*) FILTER (outcome = 'duplicate') AS duplicates,
    count(*) FILTER (line IN ('credited', 'imported') AND seconds IS NULL) AS unmeasured_hits,
    coalesce(sum(seconds) FILTER (line = 'spent'), 0) AS spent_seconds,
    coalesce(sum(seconds) FILTER (line = 'credited'), 0) AS credited_seconds,
    coalesce(sum(seconds) FILTER (line = 'imported'), 0) AS imported_seconds,
    coalesce(sum(seconds) FILTER (line = 'duplicate'), 0) AS duplicate_seconds,
    sum(overhead_seconds) AS overhead_seconds, sum(verification_seconds) AS verification_seconds"""
"""The sums of any group of ``audit_requests``."""

VIEWS = """
-- Lookups, each once. An event's rows are there as a whole, once or several times: only those of the latter are compared.
CREATE VIEW lookups_once AS
WITH doubled AS (SELECT store, seq FROM lookups GROUP BY store, seq HAVING count(*) > max(n) + 1)
SELECT * FROM lookups ANTI JOIN doubled USING (store, seq)
UNION ALL
SELECT * FROM (SELECT DISTINCT ON (store, seq, n) * FROM lookups SEMI JOIN doubled USING (store, seq));

-- When each run took place, all its processes together. status: unfinished where one of them has not told its end.
CREATE VIEW run_spans AS
WITH known AS (
    SELECT run FROM runs UNION SELECT run FROM run_ends UNION SELECT run FROM lookups UNION SELECT run FROM overheads
), started AS (
    SELECT run, min(started_at) AS started_at, arg_min(command, started_at) AS command, arg_min(client, started_at) AS client,
        count(DISTINCT (store, seq)) AS processes
    FROM runs GROUP BY run
), ended AS (
    SELECT run, max(ended_at) AS ended_at, count(DISTINCT (store, seq)) AS processes,
        CASE WHEN bool_or(status = 'failed') THEN 'failed' WHEN bool_or(status = 'interrupted') THEN 'interrupted'
            ELSE max(status) END AS status
    FROM run_ends GROUP BY run
)
SELECT run, started.started_at, ended.ended_at,
    CASE WHEN ended.run IS NULL OR ended.processes < started.processes THEN 'unfinished' ELSE ended.status END AS status,
    started.command, started.client
FROM known LEFT JOIN started USING (run) LEFT JOIN ended USING (run);

-- What each run reused and what that saved. saved = credits of hits − our own overhead. Duplicates are a line of their own, with
-- the hits on what the run itself had computed before.
CREATE VIEW hits_by_run AS
WITH asked AS (
    SELECT run,
        count(*) FILTER (outcome = 'hit') AS hits,
        count(*) FILTER (outcome = 'miss') AS misses,
        count(*) FILTER (outcome = 'uncacheable') AS uncacheable,
        count(*) FILTER (outcome = 'duplicate') AS duplicates,
        count(*) FILTER (outcome = 'hit' AND seconds IS NULL AND reason IS DISTINCT FROM 'own') AS unmeasured_hits,
        coalesce(sum(seconds) FILTER (outcome = 'hit' AND reason IS DISTINCT FROM 'own'), 0) AS credited_seconds,
        coalesce(sum(seconds) FILTER (outcome = 'duplicate' OR reason = 'own'), 0) AS duplicate_seconds,
        coalesce(sum(seconds) FILTER (outcome IN ('miss', 'uncacheable')), 0) AS spent_seconds
    FROM (SELECT DISTINCT ON (store, seq, n) * FROM lookups) GROUP BY run
), own AS (
    SELECT run, sum(seconds) AS seconds FROM (SELECT DISTINCT ON (store, seq, kind) * FROM overheads) GROUP BY run
), loads AS (
    SELECT run, count(*) AS loads FROM (SELECT DISTINCT ON (store, seq) * FROM model_loads) GROUP BY run
)
SELECT s.run, s.started_at, s.ended_at, s.status, s.command, s.client,
    coalesce(hits, 0) AS hits, coalesce(misses, 0) AS misses, coalesce(uncacheable, 0) AS uncacheable,
    coalesce(duplicates, 0) AS duplicates, coalesce(loads, 0) AS model_loads,
    coalesce(credited_seconds, 0) - coalesce(own.seconds, 0) AS saved_seconds,
    coalesce(credited_seconds, 0) AS credited_seconds, coalesce(own.seconds, 0) AS overhead_seconds,
    coalesce(duplicate_seconds, 0) AS duplicate_seconds, coalesce(spent_seconds, 0) AS spent_seconds,
    coalesce(unmeasured_hits, 0) AS unmeasured_hits,
    hits / nullif(hits + misses + uncacheable, 0) AS hit_rate,
    credited_seconds / nullif(credited_seconds + spent_seconds, 0) AS hit_rate_by_seconds
FROM run_spans s LEFT JOIN asked USING (run) LEFT JOIN own USING (run) LEFT JOIN loads USING (run)
ORDER BY s.started_at DESC NULLS LAST, s.run;

-- What each run used of its devices. device_count: the most that one of its processes used. energy_joules: by the devices' own
-- meters while they computed; NULL where there is none.
CREATE VIEW run_devices AS
SELECT run, device, max(device_count) AS device_count, max(peak_bytes) AS peak_bytes, sum(energy_joules) AS energy_joules
FROM (SELECT DISTINCT ON (store, seq) * FROM measurements) GROUP BY run, device;

-- Every request once, with the line that it stands on and its share of its run's overhead; a run that asked nothing has one row
-- without an outcome, which bears its overhead. device, device_count: where the seconds were measured, one where nobody counted.
-- run_device: what the run computed on, or, where it computed nothing, what its hits had been computed on.
CREATE VIEW audit_requests AS
WITH asked AS NOT MATERIALIZED (
    SELECT * FROM lookups_once
), own AS (
    SELECT run, sum(seconds) AS seconds, coalesce(sum(seconds) FILTER (kind IN ('checks', 'probe')), 0) AS verification
    FROM (SELECT DISTINCT ON (store, seq, kind) * FROM overheads) GROUP BY run
), used AS (
    SELECT run, arg_max(device, (device_count, device)) AS device FROM run_devices GROUP BY run
), each AS (
    SELECT run, computed_on, run_device, coalesce(d.device_count, 1) AS run_device_count,
        coalesce(own.seconds, 0) / requests AS overhead_seconds, coalesce(own.verification, 0) / requests AS verification_seconds
    FROM (
        SELECT run, requests, coalesce(used.device, miss_on) AS computed_on, coalesce(used.device, miss_on, hit_on) AS run_device
        FROM (
            SELECT run, count(*) AS requests, max(device) FILTER (outcome = 'miss') AS miss_on,
                max(device) FILTER (outcome = 'hit') AS hit_on
            FROM asked GROUP BY run
        ) LEFT JOIN used USING (run)
    ) a LEFT JOIN own USING (run) LEFT JOIN run_devices d ON d.run = a.run AND d.device = a.run_device
), here AS (
    SELECT DISTINCT run FROM runs
), told AS (
    SELECT a.* EXCLUDE (device), each.* EXCLUDE (run, computed_on),
        CASE WHEN outcome = 'uncacheable' THEN coalesce(a.device, each.computed_on) ELSE a.device END AS device,
        CASE WHEN outcome = 'duplicate' OR reason = 'own' THEN 'duplicate' WHEN outcome <> 'hit' THEN 'spent'
            WHEN origin IS NOT NULL AND here.run IS NULL THEN 'imported' ELSE 'credited' END AS line
    FROM asked a JOIN each USING (run) LEFT JOIN here ON here.run = a.origin
)
SELECT t.run, t.asked_at, t.client, t.role, t.task, t.document, t.model, t.key, t.outcome, t.line, t.reason, t.detail, t.origin,
    t.seconds, t.device, coalesce(d.device_count, 1) AS device_count, t.overhead_seconds, t.verification_seconds,
    t.run_device, t.run_device_count
FROM told t LEFT JOIN run_devices d ON d.run = CASE t.outcome WHEN 'hit' THEN t.origin ELSE t.run END AND d.device = t.device
UNION ALL
SELECT own.run, s.started_at, s.client, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 1,
    own.seconds, own.verification, used.device, coalesce(r.device_count, 1)
FROM own JOIN run_spans s USING (run) LEFT JOIN used USING (run)
LEFT JOIN run_devices r ON r.run = own.run AND r.device = used.device
WHERE own.run NOT IN (SELECT run FROM each);

-- Loads of models, each once. devices: those that the run computed that model's answers on, else whatever it computed on.
CREATE VIEW loads_once AS
WITH alone AS (
    SELECT run, any_value(model) AS model FROM (SELECT DISTINCT run, model FROM model_names) GROUP BY run HAVING count(*) = 1
), told AS (
    SELECT l.* EXCLUDE (model), coalesce(nullif(l.model, '00000000000000000000000000000000'), alone.model) AS model
    FROM (SELECT DISTINCT ON (store, seq) * FROM model_loads) l LEFT JOIN alone USING (run)
), computed AS (
    SELECT run, model, list(DISTINCT device ORDER BY device) AS devices
    FROM lookups WHERE outcome = 'miss' AND device IS NOT NULL GROUP BY run, model
), used AS (
    SELECT run, list(device ORDER BY device) AS devices FROM run_devices GROUP BY run
)
SELECT t.store, t.seq, t.run, s.started_at, t.model, t.seconds, coalesce(c.devices, used.devices, []) AS devices
FROM told t LEFT JOIN run_spans s USING (run) LEFT JOIN computed c ON c.run = t.run AND c.model = t.model
LEFT JOIN used ON used.run = t.run;

-- Loads of models: those that were made, and those that a run was spared which hit everything that it asked of a model that an
-- earlier run had loaded. A load that was spared is credited with the last one that an earlier run measured of that model on the
-- same device, which is the one that the answers were computed on; where none was: NULL, and an unmeasured load.
CREATE VIEW audit_loads AS
WITH made AS MATERIALIZED (
    SELECT * FROM loads_once
), met AS (
    SELECT model, min(started_at) AS started_at FROM made WHERE model IS NOT NULL GROUP BY model
), measured AS (
    SELECT model, started_at, device, arg_max(seconds, (seq, store)) AS seconds
    FROM (SELECT *, unnest(devices) AS device FROM made WHERE model IS NOT NULL AND started_at IS NOT NULL)
    GROUP BY run, model, started_at, device
), asleep AS (
    SELECT run, a.model, s.started_at, a.devices
    FROM (SELECT run, model, list(DISTINCT device) FILTER (outcome = 'hit' AND device IS NOT NULL) AS devices
        FROM lookups WHERE model IS NOT NULL GROUP BY run, model
        HAVING bool_or(outcome = 'hit') AND NOT bool_or(outcome = 'miss')) a JOIN run_spans s USING (run) JOIN met USING (model)
    WHERE met.started_at < s.started_at AND run NOT IN (SELECT run FROM made WHERE model IS NULL)
        AND (run, a.model) NOT IN (SELECT (run, model) FROM made WHERE model IS NOT NULL)
), credited AS (
    SELECT run, a.model, arg_max(m.seconds, (m.started_at, m.device)) AS seconds
    FROM (SELECT run, model, started_at, unnest(devices) AS device FROM asleep) a
    ASOF JOIN measured m ON m.model = a.model AND m.device = a.device AND a.started_at > m.started_at GROUP BY run, a.model
)
SELECT run, model, count(*) AS loads, sum(seconds) AS load_seconds, 0 AS avoided_loads, 0.0 AS avoided_load_seconds,
    0 AS unmeasured_loads
FROM made GROUP BY run, model
UNION ALL
SELECT run, model, 0, 0.0, 1, seconds, (seconds IS NULL)::INTEGER
FROM asleep LEFT JOIN credited USING (run, model);

-- The audit, a row a run.
CREATE VIEW audit_by_run AS
WITH sums AS (
    SELECT run, {sums}
    FROM audit_requests GROUP BY run
), loads AS (
    SELECT run, sum(loads) AS loads, sum(load_seconds) AS load_seconds, sum(avoided_loads) AS avoided_loads,
        sum(avoided_load_seconds) AS avoided_load_seconds, sum(unmeasured_loads) AS unmeasured_loads
    FROM audit_loads GROUP BY run
), energy AS (
    SELECT run, sum(energy_joules) AS energy_joules, max(peak_bytes) AS peak_bytes FROM run_devices GROUP BY run
)
SELECT s.*, coalesce(requests, 0) AS requests, coalesce(hits, 0) AS hits, coalesce(own_hits, 0) AS own_hits,
    coalesce(imported_hits, 0) AS imported_hits, coalesce(misses, 0) AS misses, coalesce(uncacheable, 0) AS uncacheable,
    coalesce(duplicates, 0) AS duplicates, coalesce(unmeasured_hits, 0) AS unmeasured_hits,
    coalesce(spent_seconds, 0) AS spent_seconds, coalesce(credited_seconds, 0) AS credited_seconds,
    coalesce(imported_seconds, 0) AS imported_seconds, coalesce(duplicate_seconds, 0) AS duplicate_seconds,
    coalesce(overhead_seconds, 0) AS overhead_seconds, coalesce(verification_seconds, 0) AS verification_seconds,
    coalesce(credited_seconds + imported_seconds - overhead_seconds, 0) AS net_seconds,
    coalesce(loads, 0)::BIGINT AS loads, coalesce(load_seconds, 0) AS load_seconds,
    coalesce(avoided_loads, 0)::BIGINT AS avoided_loads, coalesce(avoided_load_seconds, 0) AS avoided_load_seconds,
    coalesce(unmeasured_loads, 0)::BIGINT AS unmeasured_loads,
    energy_joules, peak_bytes, hits / nullif(hits + misses + uncacheable, 0) AS hit_rate,
    (credited_seconds + imported_seconds) / nullif(credited_seconds + imported_seconds + spent_seconds, 0) AS hit_rate_by_seconds
FROM run_spans s LEFT JOIN sums USING (run) LEFT JOIN loads USING (run) LEFT JOIN energy USING (run)
ORDER BY started_at DESC NULLS LAST, run;

-- The audit, a row a run and task. Overhead is the requests' share of it.
CREATE VIEW audit_by_task AS
SELECT run, client, task, {sums},
    coalesce(sum(seconds) FILTER (line IN ('credited', 'imported')), 0) - sum(overhead_seconds) AS net_seconds,
    count(*) FILTER (outcome = 'hit') / nullif(count(*) FILTER (outcome IN ('hit', 'miss', 'uncacheable')), 0) AS hit_rate,
    coalesce(sum(seconds) FILTER (line IN ('credited', 'imported')), 0)
        / nullif(coalesce(sum(seconds) FILTER (line IN ('credited', 'imported', 'spent')), 0), 0) AS hit_rate_by_seconds
FROM audit_requests GROUP BY run, client, task ORDER BY run, client, task;

-- Every miss with its cause, by the nearest of what had been stored before its run began: gone (this very key: the store has lost
-- it, or it is another store), environment (the same request to the same model), settings (the same prompt to the same model),
-- model (the same prompt to another model: weights, code or config), prompt (never asked before), first (nothing was stored).
-- refresh, corrupt, batch: as the store told. unstored: what was computed was not stored, so nothing is known of the request.
CREATE VIEW misses_explained AS
WITH missed AS (
    SELECT * FROM lookups_once WHERE outcome = 'miss'
), stored AS (
    SELECT key, any_value(prompt) AS prompt, any_value(request) AS request, any_value(r.model) AS model,
        min(created_at) AS created_at
    FROM requests r JOIN outputs USING (key) GROUP BY key
), same_request AS (
    SELECT request, model, min(created_at) AS created_at FROM stored GROUP BY request, model
), same_prompt AS (
    SELECT prompt, model, min(created_at) AS created_at FROM stored GROUP BY prompt, model
), other_model AS (
    SELECT prompt, min(created_at) AS created_at FROM stored GROUP BY prompt
)
SELECT m.run, m.asked_at, m.client, m.role, m.task, m.document, m.model, m.key, m.seconds, m.device,
    CASE WHEN m.reason <> 'absent' THEN m.reason WHEN s.key IS NULL THEN 'unstored'
        WHEN s.created_at < started_at THEN 'gone' WHEN same_request.created_at < started_at THEN 'environment'
        WHEN same_prompt.created_at < started_at THEN 'settings' WHEN other_model.created_at < started_at THEN 'model'
        WHEN (SELECT min(created_at) FROM stored) < started_at THEN 'prompt' ELSE 'first' END AS cause
FROM missed m LEFT JOIN run_spans USING (run) LEFT JOIN stored s USING (key)
LEFT JOIN same_request ON same_request.request = s.request AND same_request.model = s.model
LEFT JOIN same_prompt ON same_prompt.prompt = s.prompt AND same_prompt.model = s.model
LEFT JOIN other_model ON other_model.prompt = s.prompt;

-- Why requests missed, by run and task. share: of the task's misses in that run. example: the key of the most expensive one.
CREATE VIEW miss_reasons AS
SELECT run, client, task, cause, count(*) AS requests, coalesce(sum(seconds), 0) AS seconds,
    count(*) / sum(count(*)) OVER (PARTITION BY run, client, task) AS share,
    arg_max(key, (coalesce(seconds, 0), key)) AS example
FROM misses_explained GROUP BY run, client, task, cause ORDER BY run, client, task, requests DESC, cause;

-- Modules in which two models of one class differ in themselves, children not counted; the model that was met first on the left.
-- change: weights, code (code, attributes or class), added or removed. bytes: that the module owns itself, in b where it has it.
CREATE VIEW model_modules_changed AS
WITH held AS (
    SELECT DISTINCT ON (model, path) * FROM modules
), pairs AS (
    SELECT a.digest AS model_a, b.digest AS model_b, a.names AS names_a, b.names AS names_b
    FROM models_in_order a JOIN models_in_order b USING (class) WHERE a.place < b.place
)
SELECT names_a, names_b, a.path, CASE WHEN a.weights <> b.weights THEN 'weights' ELSE 'code' END AS change, b.class, b.bytes,
    model_a, model_b
FROM pairs JOIN held a ON a.model = model_a JOIN held b ON b.model = model_b AND b.path = a.path
WHERE a.own <> b.own
UNION ALL
SELECT names_a, names_b, b.path, 'added', b.class, b.bytes, model_a, model_b
FROM pairs JOIN held b ON b.model = model_b LEFT JOIN held a ON a.model = model_a AND a.path = b.path WHERE a.model IS NULL
UNION ALL
SELECT names_a, names_b, a.path, 'removed', a.class, a.bytes, model_a, model_b
FROM pairs JOIN held a ON a.model = model_a LEFT JOIN held b ON b.model = model_b AND b.path = a.path WHERE b.model IS NULL;

-- What changed from each model to the next one of its family, block by block. A family: models of one class with as many
-- parameters, in the order in which the ledger met them. A block: a layer with all that is in it, or a module outside of layers.
-- modules, bytes: of the block in b, and what b lacks of a. modules_changed, bytes_changed: of these, those that differ in
-- themselves, are added, or removed. weights_changed: modules whose own tensors differ, which by a change of code they do not.
CREATE VIEW model_blocks_changed AS
WITH held AS (
    SELECT DISTINCT ON (model, path) *,
        coalesce(nullif(regexp_extract(path, '^(.*?[.][0-9]+)([.]|$)', 1), ''), path) AS block
    FROM modules
), pairs AS (
    SELECT class, place, names AS names_b, digest AS model_b, lag(digest) OVER family AS model_a,
        lag(names) OVER family AS names_a
    FROM models_in_order WINDOW family AS (PARTITION BY class, parameters ORDER BY place)
), compared AS (
    SELECT p.*, b.block, b.bytes, a.model IS NULL OR a.own <> b.own AS changed,
        a.model IS NULL OR a.weights <> b.weights AS weighed
    FROM pairs p JOIN held b ON b.model = p.model_b LEFT JOIN held a ON a.model = p.model_a AND a.path = b.path
    WHERE p.model_a IS NOT NULL
    UNION ALL
    SELECT p.*, a.block, a.bytes, TRUE, TRUE
    FROM pairs p JOIN held a ON a.model = p.model_a LEFT JOIN held b ON b.model = p.model_b AND b.path = a.path
    WHERE b.model IS NULL
)
SELECT class, names_a, names_b, block, count(*) AS modules, count(*) FILTER (changed) AS modules_changed,
    count(*) FILTER (weighed) AS weights_changed, sum(bytes)::BIGINT AS bytes,
    coalesce(sum(bytes) FILTER (changed), 0)::BIGINT AS bytes_changed, model_a, model_b, place
FROM compared GROUP BY ALL ORDER BY place, block;
""".replace("{sums}", SUMS)
