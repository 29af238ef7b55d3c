-- feedback -> item_rate: each item's log odds of dislike against like, smoothed towards the mean of all.
--
-- {feedback}  feedback before the anchors
WITH counts AS (
  SELECT
    item_id,
    count_if(polarity = -1) AS n_negatives,
    count_if(polarity = 1) AS n_positives
  FROM (SELECT DISTINCT user_id, item_id, polarity FROM {feedback})
  GROUP BY item_id
),
prior AS (
  SELECT (sum(n_negatives) + 1) / (sum(n_negatives + n_positives) + 2) AS rate FROM counts
)
SELECT
  item_id, n_negatives, n_positives,
  ln((n_negatives + :pseudo_events * rate) / (n_positives + :pseudo_events * (1 - rate))) AS log_odds
FROM counts CROSS JOIN prior
