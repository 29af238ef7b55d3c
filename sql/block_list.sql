-- negative_item_set + user_context + user_taste -> one row per user with all that block_list needs.
--
-- {predicted}  negative_item_set of the day
-- {contexts}   user_context of the day
-- {tastes}     user_taste of the day
WITH sets AS (
  SELECT
    user_id,
    sort_array(collect_list(struct(rank, codes, log_prob))) AS entries
  FROM {predicted}
  GROUP BY user_id
)
SELECT
  s.user_id, s.entries, c.negatives, c.n_negatives, c.n_positives, c.categories, t.weights
FROM sets s
JOIN {contexts} c ON s.user_id = c.user_id
LEFT JOIN {tastes} t ON s.user_id = t.user_id
