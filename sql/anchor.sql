-- feedback -> anchor: an explicit anchor per user, for logs whose users come in bursts (DESIGN section 8).
--
-- {feedback}  all feedback
WITH last AS (
  SELECT user_id, max(event_time) AS last_dislike
  FROM {feedback} WHERE polarity = -1
  GROUP BY user_id
),
-- First event of the stretch that ends with the last dislike.
stretch AS (
  SELECT f.user_id, min(f.event_time) AS begins
  FROM {feedback} f JOIN last l ON f.user_id = l.user_id
  WHERE f.event_time > l.last_dislike - make_dt_interval(:horizon_days)
  GROUP BY f.user_id
),
ends AS (
  SELECT max(event_time) - make_dt_interval(:horizon_days) AS latest FROM {feedback}
),
-- Where the stretch is the user's first: the middle event.
middle AS (
  SELECT
    user_id,
    min(event_time) AS first_event,
    element_at(array_sort(collect_list(event_time)), CAST(count(*) DIV 2 + 1 AS INT)) AS middle_event
  FROM {feedback}
  GROUP BY user_id
)
SELECT
  s.user_id,
  CASE
    WHEN m.first_event < s.begins THEN least(s.begins, e.latest)
    ELSE m.middle_event
  END - make_dt_interval(0, 0, 0, 0.000001) AS anchor_time
FROM stretch s
JOIN middle m ON s.user_id = m.user_id
CROSS JOIN ends e
-- A user whose only burst came too late for a whole horizon after its middle has no anchor.
WHERE m.first_event < s.begins OR m.middle_event <= e.latest
