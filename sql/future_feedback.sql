-- feedback + item_graph -> future_feedback: what each user did in (anchor, anchor + horizon].
--
-- {feedback}  feedback that reaches the end of every horizon
-- {anchors}   user_id, anchor_time
-- {graph}     item_graph as of the anchors
WITH future AS (
  SELECT a.user_id, a.anchor_time, f.item_id, f.polarity
  FROM {anchors} a
  JOIN {feedback} f
    ON a.user_id = f.user_id
   AND f.event_time > a.anchor_time
   AND f.event_time <= a.anchor_time + make_dt_interval(:horizon_days)
),
labels AS (
  SELECT
    user_id, anchor_time,
    array_sort(collect_set(CASE WHEN polarity = -1 THEN item_id END)) AS future_negatives,
    array_sort(collect_set(CASE WHEN polarity = 1 THEN item_id END)) AS future_positives
  FROM future
  GROUP BY user_id, anchor_time
),
neighbours AS (
  SELECT n.user_id, n.anchor_time, g.neighbor_id AS item_id, max_by(n.item_id, g.score) AS via, max(g.score) AS score
  FROM (SELECT DISTINCT user_id, anchor_time, item_id FROM future WHERE polarity = -1) n
  JOIN {graph} g ON g.item_id = n.item_id AND g.rank <= :expansion
  GROUP BY n.user_id, n.anchor_time, g.neighbor_id
),
expanded AS (
  SELECT
    user_id, anchor_time,
    transform(
      array_sort(collect_list(struct(-score AS order, item_id, via, score))),
      e -> named_struct('item_id', e.item_id, 'via', e.via, 'score', e.score)
    ) AS expanded_negatives
  FROM neighbours
  GROUP BY user_id, anchor_time
)
SELECT
  l.user_id, l.anchor_time, l.future_negatives,
  coalesce(
    filter(e.expanded_negatives, x -> NOT array_contains(l.future_negatives, x.item_id)), array()
  ) AS expanded_negatives,
  l.future_positives
FROM labels l
LEFT JOIN expanded e ON l.user_id = e.user_id AND l.anchor_time = e.anchor_time
