-- feedback -> user_context: what each user disliked and liked before the anchor, most recent first.
--
-- {feedback}  feedback of the window
-- {anchors}   user_id, anchor_time; a user may have several
SELECT
  a.user_id,
  a.anchor_time,
  transform(
    slice(sort_array(collect_list(
      CASE WHEN f.polarity = -1 THEN struct(f.event_time, f.item_id, f.reason_class) END
    ), false), 1, :max_negatives),
    e -> named_struct('item_id', e.item_id, 'event_time', e.event_time, 'reason_class', e.reason_class)
  ) AS negatives,
  transform(
    slice(sort_array(collect_list(
      CASE WHEN f.polarity = 1 THEN struct(f.event_time, f.item_id, f.reason_class) END
    ), false), 1, :max_positives),
    e -> named_struct('item_id', e.item_id, 'event_time', e.event_time, 'reason_class', e.reason_class)
  ) AS positives,
  CAST(count_if(f.polarity = -1) AS INT) AS n_negatives,
  CAST(count_if(f.polarity = 1) AS INT) AS n_positives
FROM {anchors} a
JOIN {feedback} f
  ON a.user_id = f.user_id
 AND f.event_time < a.anchor_time
 AND f.event_time >= a.anchor_time - make_dt_interval(:window_days)
GROUP BY a.user_id, a.anchor_time
