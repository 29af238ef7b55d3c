"""negrec: a daily batch job that predicts, per user, the items the user will reject.

This package is the library: schemas, the Delta store, Swing, semantic IDs, the trie and the
constrained beam search, the block score and the block list reader. It opens no Spark session and
runs no training loop; importing it needs numpy, pyarrow, deltalake, pydantic and safetensors only.
"""

__version__ = "0.1.0"
