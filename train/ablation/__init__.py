"""`python -m train.ablation`: what each part of the curriculum adds (DESIGN sections 7 and 8).

A grid of variants of the generator and seeds, over warehouses that were backfilled and hold the samples of
all steps (`negrec --config movielens,conrec train generator` makes them). No Spark is needed. A variant is a
chain of training steps; chains that begin alike share what they have in common, which is trained once. Every
variant predicts 20 IDs for each judged user with the torch engine and is compared with another one, its
`above`, on the same resampled users.

A finished cell is a file and is not worked out again; a failed one keeps its error and is tried again. At the
end of `--minutes` what is unfinished is stopped: finished cells and finished steps stay.
"""
