"""What produces the models: codebook, alignment, GRPO, agents, baselines, evaluation.

Nothing here imports pyspark; tables are read through deltalake.
"""
