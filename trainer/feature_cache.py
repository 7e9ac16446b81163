"""--cache_features: encodes the pictures of a run once, before its first step; never again if an earlier run did."""

import shutil
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from common.devices import autocast, pick_dtype
from common.distributed import gather, is_main, rank, say, world_size
from dataset.features import NO_KEY, FeatureCache, Pictures, read_hashes, write_hashes
from model.families import family_of
from trainer.loader import ignore_interrupt

ARCHITECTURE = ("image_size", "patch_size", "num_attention_heads", "hidden_act", "layer_norm_eps")
ARCHITECTURE += ("rms_norm_eps", "rope_theta")  # not visible in the weights; only some encoders have the last two


def cache_features(args, model, encoder_sha256: str, device, *sets) -> None:
    """Gives the rows of all data sets picture features in place of pixels.

    Features are computed in the precision of the run and stored as --cache_dtype. A picture is read and hashed only if
    its file is new, or if its size or time differs from an earlier start; it is encoded only if its content is new.
    Ranks share the work. If nothing is missing, the folder is only read.

    sets: data sets or None, the training rows first. With --on_bad_row error their broken pictures end the run now, not
    at their step. Raises ValueError if the disk has no room, or for a broken picture.
    """
    if not args.cache_features:
        return
    sets = [data for data in sets if data is not None]
    dtype, config = pick_dtype(args.dtype, device), model.config
    known = model.vision_encoder.config
    settings = {
        "encoder": encoder_sha256,
        "architecture": {key: getattr(known, key) for key in ARCHITECTURE if hasattr(known, key)},
        "preprocessing": vars(model.processor),
        "computed as": str(dtype),
    }
    if family_of(known.model_type).norm and config.projector == "linear":
        settings["features"] = "before the last norm"
    cache = FeatureCache(args.cache_features, settings, config.patches, config.ve_hidden_size, args.cache_dtype)
    pictures = Pictures(sets)
    keys, broken = hash_all(pictures, args)
    numbers = cache.find(keys)
    first = {key: i for i, key in reversed(list(enumerate(keys)))}  # files with the same content are one picture
    missing = sorted(i for key, i in first.items() if key != NO_KEY and numbers[i] < 0)
    missing = gather(missing)[0]  # as the first rank sees it: another run may be adding features
    check_room(cache, len(keys), len(missing))
    if missing:
        encode(pictures, missing, cache, broken, args, model, device, dtype)
        cache.refresh()
        numbers = cache.find(keys)
    pictures.decode = True
    for i, key in enumerate(keys):
        if key == NO_KEY or numbers[i] >= 0 or i in broken:
            continue
        broken[i] = pictures[i][-1]  # or it has the same content as a broken picture
        if not broken[i]:
            raise ValueError(
                f"--cache_features: the picture of {pictures.where(i)} changed while features were computed,\n"
                f"or not all ranks share {args.cache_features}. Start again, with a folder that all share"
            )
    first_broken = min(broken, default=len(pictures))
    if args.on_bad_row == "error" and first_broken < pictures.ends[0]:
        where, why = pictures.where(first_broken), broken[first_broken]
        raise ValueError(f"{where}: {why}\nFix it, or skip such rows with --on_bad_row skip")
    pictures.attach(cache, numbers, broken)
    model.vision_encoder = None  # frees its memory: all rows have features now


def check_room(cache: FeatureCache, pictures: int, missing: int) -> None:
    """Prints how many features are missing. Raises ValueError if they do not fit on the disk."""
    folder = next(path for path in (cache.path, *cache.path.absolute().parents) if path.exists())
    size, free = missing * cache.picture_bytes, min(gather(shutil.disk_usage(folder).free))
    say(
        f"features of {pictures:,} pictures in {cache.path}: {missing:,} are missing, {size / 1e9:.3g} GB; the disk "
        f"has {free / 1e9:.1f} GB free"
    )
    if size > 0.95 * free:
        raise ValueError(
            f"--cache_features {cache.path.parent}: needs {size / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free.\n"
            "Choose a folder on another disk, halve the size with --cache_dtype int8, or leave the flag out"
        )


def batches_of(pictures: Pictures, numbers: list[int], args, batch_size: int, name: str):
    """Iterates over batches of pictures, given their numbers; the first rank shows a progress bar if it takes long."""
    how = {"num_workers": args.num_workers, "collate_fn": list, "worker_init_fn": ignore_interrupt}
    batches = DataLoader(Subset(pictures, numbers), batch_size, **how)
    return tqdm(batches, desc=name, unit="batch", disable=not is_main() or len(numbers) < 2000)


def hash_all(pictures: Pictures, args) -> tuple[list[bytes], dict[int, str]]:
    """Returns the hash of each picture, and {picture: reason} for those that cannot be read; the same on all ranks."""
    folder = Path(args.cache_features)
    known = read_hashes(folder)
    stamps = {i: pictures.stamp(i) for i in range(rank(), len(pictures), world_size())}
    hashes, broken = {i: known[stamp] for i, stamp in stamps.items() if stamp in known}, {}
    unread = [i for i in stamps if i not in hashes]
    for batch in batches_of(pictures, unread, args, 256, "reading pictures"):
        for i, key, _, why in batch:
            hashes[i] = key
            if why:
                broken[i] = why
    new = {stamps[i]: hashes[i] for i in unread if NO_KEY not in (stamps[i], hashes[i])}
    for of_rank in gather((hashes, broken, new)):
        for merged, part in zip((hashes, broken, new), of_rank):
            merged.update(part)
    if new and is_main():
        write_hashes(folder, known | new)
    return [hashes[i] for i in range(len(pictures))], broken


@torch.no_grad()
def encode(pictures: Pictures, missing: list[int], cache: FeatureCache, broken: dict, args, model, device, dtype):
    """Computes features and adds them to the cache; records in `broken` which pictures cannot be decoded."""
    cache.begin()
    pictures.decode = True
    for batch in batches_of(pictures, missing[rank() :: world_size()], args, args.batch_size, "encoding pictures"):
        for i, _, _, why in batch:
            if why:
                broken[i] = why
        good = [(key, pixels) for _, key, pixels, why in batch if not why]
        if good:
            keys, pixels = zip(*good)
            with autocast(device, dtype):
                cache.add(list(keys), model.encode_pictures(torch.stack(pixels).to(device)))
    cache.flush()
    for of_rank in gather(broken):  # waits until all ranks have written their features
        broken.update(of_rank)
