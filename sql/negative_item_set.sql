-- An earlier day's beams + the contexts of then and now -> the beams that hold now too.
--
-- {earlier}          negative_item_set_shard of an earlier day
-- {contexts_before}  user_context that they were generated from
-- {contexts}         user_context of the day
-- {new_items}        item_id of the items that have got their semantic ID since
SELECT
  s.user_id, s.rank, s.codes, s.log_prob, s.codebook_version, s.model_version,
  coalesce(s.carried_from, s.ds) AS carried_from
FROM {earlier} s
LEFT SEMI JOIN (
  SELECT c.user_id
  FROM {contexts} c
  JOIN {contexts_before} b
    ON c.user_id = b.user_id
   AND c.negatives <=> b.negatives
   AND c.positives <=> b.positives
) same ON s.user_id = same.user_id
LEFT ANTI JOIN (
  SELECT e.user_id
  FROM (
    SELECT user_id, explode(concat(negatives.item_id, positives.item_id)) AS item_id FROM {contexts}
  ) e
  JOIN {new_items} n ON e.item_id = n.item_id
) named ON s.user_id = named.user_id
