"""--cache_features: the pictures of a run are encoded once, before its first step, or never if they were before."""

import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from common.devices import autocast, pick_dtype
from common.distributed import gather, is_main, rank, say, world_size
from common.files import write_safely
from dataset.features import NO_KEY, FeatureCache, Pictures, places
from trainer.loader import ignore_interrupt

ARCHITECTURE = ("image_size", "patch_size", "num_attention_heads", "hidden_act", "layer_norm_eps")  # no weight tells


def cache_features(args, model, encoder_sha256: str, device, *sets) -> None:
    """Gives the rows of all data sets (None among them is none) their picture features, in place of pixels.

    Features are computed in the precision of the run and kept as --cache_dtype. A picture is read and hashed where its
    file is new or has another size or time than at an earlier start, and computed again if it has changed. Ranks share
    the work. A folder that lacks nothing is only read.

    sets: the training rows first; under --on_bad_row error their broken pictures end the run now, not at their step.
    Raises ValueError if the disk has no room, or for a broken picture.
    """
    if not args.cache_features:
        return
    sets = [data for data in sets if data is not None]
    dtype = pick_dtype(args.dtype, device)
    about = {
        "encoder": encoder_sha256,
        "architecture": {key: getattr(model.vision_encoder.config, key) for key in ARCHITECTURE},
        "preprocessing": vars(model.processor),
        "computed as": str(dtype),
    }
    config = model.config
    cache = FeatureCache(args.cache_features, about, len(config.image_ids), config.ve_hidden_size, args.cache_dtype)
    pictures = Pictures(sets)
    keys, broken = hash_all(pictures, args)
    numbers = cache.find(keys)
    readable = (keys != np.frombuffer(NO_KEY, np.uint8)).any(axis=1)
    _, first = np.unique(keys, axis=0, return_index=True)  # files with the same content are one picture
    missing = gather([i for i in first.tolist() if readable[i] and numbers[i] < 0])[0]  # another run may be adding
    tell(cache, len(keys), len(missing))
    if missing:
        encode(pictures, missing, cache, broken, args, model, device, dtype)
        cache.refresh()
        numbers = cache.find(keys)
    pictures.decode = True
    for i in sorted({*np.flatnonzero(readable & (numbers < 0)).tolist()} - broken.keys()):
        broken[i] = pictures[i][-1]  # the same content as that of a broken picture
        if not broken[i]:
            raise ValueError(
                f"--cache_features: the picture of {pictures.where(i)} changed while features were computed,\n"
                f"or not all ranks see {args.cache_features}. Start once more, with a folder that all see"
            )
    first_broken = min(broken, default=len(pictures))
    if args.on_bad_row == "error" and first_broken < pictures.ends[0]:
        where, why = pictures.where(first_broken), broken[first_broken]
        raise ValueError(f"{where}: {why}\nMend it, or leave such rows out with --on_bad_row skip")
    pictures.attach(cache, numbers, broken)
    if device.type == "cuda" and world_size() == 1:  # DistributedDataParallel wants all weights on one device
        model.vision_encoder.to("cpu")  # room for batches


def tell(cache: FeatureCache, pictures: int, missing: int) -> None:
    """How much there is to do. Raises ValueError if it does not fit on the disk."""
    there = next(path for path in (cache.path, *cache.path.absolute().parents) if path.exists())
    size, free = missing * cache.picture_bytes, min(gather(shutil.disk_usage(there).free))
    say(
        f"features of {pictures:,} pictures in {cache.path}: {missing:,} are missing, {size / 1e9:.3g} GB; the disk "
        f"has room for {free / 1e9:.1f} GB"
    )
    if size > 0.95 * free:
        raise ValueError(
            f"--cache_features {cache.path.parent}: {size / 1e9:.1f} GB do not fit on a disk of {free / 1e9:.1f} GB.\n"
            "Name a folder on another, halve them with --cache_dtype int8, or leave the flag out"
        )


def batches_of(pictures: Pictures, numbers: list[int], args, batch_size: int, name: str):
    """Pictures by their numbers; with a bar on the first rank, where it takes long enough to look at."""
    how = {"num_workers": args.num_workers, "collate_fn": list, "worker_init_fn": ignore_interrupt}
    batches = DataLoader(Subset(pictures, numbers), batch_size, **how)
    return tqdm(batches, desc=name, unit="batch", disable=not is_main() or len(numbers) < 2000)


def hash_all(pictures: Pictures, args) -> tuple[np.ndarray, dict[int, str]]:
    """uint8 (pictures, 16), the hash of each, and {picture: why} of those that cannot be read; on all ranks."""
    path = Path(args.cache_features) / "hashes.npy"
    own, known = range(rank(), len(pictures), world_size()), read_hashes(path)
    stamps = [pictures.stamp(i) for i in own]
    at = places(known[:, :16], np.frombuffer(b"".join(stamps), np.uint8).reshape(-1, 16))
    hashes, broken = {i: known[place, 16:].tobytes() for i, place in zip(own, at) if place >= 0}, {}
    unread = [i for i in own if i not in hashes]
    for batch in batches_of(pictures, unread, args, 256, "reading pictures"):
        for i, key, _, why in batch:
            hashes[i] = key
            if why:
                broken[i] = why
    fresh = [(stamp, hashes[i]) for i, stamp, place in zip(own, stamps, at) if place < 0]
    new = [stamp + key for stamp, key in fresh if NO_KEY not in (stamp, key)]
    keys, learned = np.zeros((len(pictures), 16), np.uint8), []
    for found, why, more in gather((hashes, broken, new)):
        broken |= why
        learned += more
        if found:
            keys[list(found)] = np.frombuffer(b"".join(found.values()), np.uint8).reshape(-1, 16)
    if learned and is_main():
        table = np.concatenate([known, np.frombuffer(b"".join(learned), np.uint8).reshape(-1, 32)])
        with suppress(OSError):  # all that is lost is time at the next start
            write_safely(path, lambda file: np.save(file, table))
    return keys, broken


def read_hashes(path: Path) -> np.ndarray:
    """What `hash_all` wrote at earlier starts, uint8 (n, 32); none where it is not there or damaged."""
    with suppress(OSError, ValueError, EOFError):
        known = np.load(path)
        if known.dtype == np.uint8 and known.shape[1:] == (32,):
            return known
    return np.empty((0, 32), np.uint8)


@torch.no_grad()
def encode(pictures: Pictures, missing: list[int], cache: FeatureCache, broken: dict, args, model, device, dtype):
    """Computes features and adds them to the cache; notes in `broken` which pictures cannot be decoded."""
    own = missing[rank() :: world_size()]
    cache.begin()
    pictures.decode = True
    for batch in batches_of(pictures, own, args, args.batch_size, "encoding pictures"):
        for i, _, _, why in batch:
            if why:
                broken[i] = why
        good = [(key, pixels) for _, key, pixels, why in batch if not why]
        if good:
            keys, pixels = zip(*good)
            with autocast(device, dtype):
                cache.add(list(keys), model.encode_pictures(torch.stack(pixels).to(device)))
    cache.flush()
    for found in gather(broken):  # all have written what they have
        broken |= found
