"""--cache_features: the pictures of a run are encoded once, before its first step, or never if they were before."""

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
ARCHITECTURE += ("rms_norm_eps", "rope_theta")  # no weight tells; the last two only where an encoder has them


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
    missing = gather(missing)[0]  # as the first rank sees it: another run may be adding
    check_room(cache, len(keys), len(missing))
    if missing:
        encode(pictures, missing, cache, broken, args, model, device, dtype)
        cache.refresh()
        numbers = cache.find(keys)
    pictures.decode = True
    for i, key in enumerate(keys):
        if key == NO_KEY or numbers[i] >= 0 or i in broken:
            continue
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


def check_room(cache: FeatureCache, pictures: int, missing: int) -> None:
    """Prints how much there is to do. Raises ValueError if it does not fit on the disk."""
    folder = next(path for path in (cache.path, *cache.path.absolute().parents) if path.exists())
    size, free = missing * cache.picture_bytes, min(gather(shutil.disk_usage(folder).free))
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


def hash_all(pictures: Pictures, args) -> tuple[list[bytes], dict[int, str]]:
    """The hash of each picture, and {picture: why} of those that cannot be read; on all ranks."""
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
    """Computes features and adds them to the cache; notes in `broken` which pictures cannot be decoded."""
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
    for of_rank in gather(broken):  # all have written what they have
        broken.update(of_rank)
