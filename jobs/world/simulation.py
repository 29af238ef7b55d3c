"""Making a world: its catalogue, then every chunk of users day by day."""

import datetime as dt
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import yaml

from jobs.world.catalogue import make_world, write_items
from jobs.world.day import ALREADY, react, recommend, remember
from jobs.world.log import to_events
from jobs.world.settings import WorldSettings, WorldSummary
from jobs.world.users import USER_FILES, make_users, n_chunks
from negrec_core.errors import ConfigError
from negrec_core.resources import resource


def generate(
    settings: WorldSettings, out: Path, progress: Callable[[int, int], None] | None = None
) -> WorldSummary:
    """Write the world into `out`; memory grows with the users of one chunk, not with all of them.

    Args:
        settings: what world to make.
        out: a directory that is empty or not there yet.
        progress: called with (steps done, steps in all) after each day of a chunk of users.

    Raises:
        ConfigError: `out` holds something already.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"world: {out} is not an empty directory; choose another or empty it")
    (out / "truth").mkdir(parents=True)
    vocabulary = yaml.safe_load(resource("conf", "world", "vocabulary.yaml").read_text(encoding="utf-8"))
    rng = np.random.default_rng([settings.seed, 0])
    world = make_world(settings, vocabulary, rng)
    write_items(world, vocabulary, rng, out)
    chunks = n_chunks(settings)
    counts = np.zeros(5, dtype=np.int64)
    with ExitStack() as stack:
        writers = {
            path: stack.enter_context(pq.ParquetWriter(out / path, schema))
            for path, schema in USER_FILES.items()
        }
        for chunk in range(chunks):
            users = make_users(world, chunk, writers)
            for day in range(settings.days):
                rng = np.random.default_rng([settings.seed, 2, chunk, day])
                shown = recommend(world, users, day, rng)
                reactions = react(world, users, shown, rng)
                table = to_events(world, users, day, shown, reactions, rng)
                date = settings.start + dt.timedelta(days=day)
                folder = out / "events" / f"day={date.isoformat()}"
                folder.mkdir(parents=True, exist_ok=True)
                pq.write_table(table, folder / f"part-{chunk:05d}.parquet", compression="zstd")
                remember(world, users, day, shown, reactions)
                counts += [
                    len(shown.item),
                    reactions.click.sum(),
                    reactions.buy.sum(),
                    (reactions.reason >= 0).sum(),
                    (reactions.reason >= ALREADY).sum(),
                ]
                if progress is not None:
                    progress(chunk * settings.days + day + 1, chunks * settings.days)
    return WorldSummary(settings.users, settings.items, settings.days, *(int(count) for count in counts))
