-- behavior_log -> feedback: every event that says like or dislike, explicit or judged (DESIGN section 4).
--
-- {log}       behavior_log of one or more days; no day sees another
-- {polarity}  action, polarity
-- {reasons}   reason, reason_class; class 'dropped' is not negative interest
-- {views}     item_id, ds, views: how often each item was really played up to that day
WITH explicit AS (
  SELECT
    l.ds, l.user_id, l.item_id, l.event_time, p.polarity,
    CASE WHEN l.reason IS NOT NULL THEN coalesce(r.reason_class, :other_reason) END AS reason_class
  FROM {log} l
  JOIN {polarity} p ON l.action = p.action
  LEFT JOIN {reasons} r ON lower(l.reason) = lower(r.reason)
  WHERE p.polarity <> 0
),
kept AS (
  SELECT * FROM explicit
  WHERE polarity = 1 OR reason_class IS NULL OR reason_class <> 'dropped'
),
-- One row per instant at which the user did anything: the neighbours that show the user was there.
instants AS (
  SELECT
    ds, user_id, event_time, session_id,
    lag(event_time)  OVER (PARTITION BY ds, user_id, session_id ORDER BY event_time) AS before,
    lead(event_time) OVER (PARTITION BY ds, user_id, session_id ORDER BY event_time) AS after
  FROM (SELECT DISTINCT ds, user_id, event_time, session_id FROM {log})
),
-- A skip: opened and played (a grid item that was not opened is not one), but hardly.
skips AS (
  SELECT DISTINCT l.ds, l.user_id, l.item_id, l.event_time
  FROM {log} l
  JOIN instants n
    ON l.ds = n.ds AND l.user_id = n.user_id AND l.event_time = n.event_time AND l.session_id <=> n.session_id
  JOIN {views} v ON l.ds = v.ds AND l.item_id = v.item_id
  WHERE :implicit
    AND l.play_ms > 0 AND l.duration_ms > 0
    AND l.play_ms / l.duration_ms < :max_play_rate
    AND (:max_play_ms IS NULL OR l.play_ms < :max_play_ms)
    AND (:any_surface OR array_contains(:surfaces, l.surface))
    AND v.views >= :min_item_views
    AND (
      :max_gap_seconds IS NULL
      OR (unix_micros(l.event_time) - unix_micros(n.before) <= :max_gap_seconds * 1000000
          AND unix_micros(n.after) - unix_micros(l.event_time) <= :max_gap_seconds * 1000000)
    )
),
-- What the user said outweighs what the play time suggests.
implicit AS (
  SELECT s.* FROM skips s
  LEFT ANTI JOIN explicit e ON s.ds = e.ds AND s.user_id = e.user_id AND s.item_id = e.item_id
)
SELECT
  ds, user_id, item_id, event_time, polarity,
  'explicit' AS source, max(reason_class) AS reason_class, CAST(1.0 AS DOUBLE) AS weight
FROM kept
GROUP BY ds, user_id, item_id, event_time, polarity
UNION ALL
SELECT
  ds, user_id, item_id, event_time, -1 AS polarity,
  'implicit' AS source, CAST(NULL AS STRING) AS reason_class, CAST(:weight AS DOUBLE) AS weight
FROM implicit
