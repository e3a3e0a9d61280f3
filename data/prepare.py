"""Text to tokens: python data/prepare.py [stories|tinystories|FILE] writes train.bin, val.bin and meta.json.

Both .bin files are one stream of uint16 tokens: <|endoftext|>, a story, <|endoftext|>, a story, ..., <|endoftext|>.
"""

import glob
import hashlib
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
from functools import partial
from itertools import chain, islice
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from tqdm import tqdm

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))  # where the package `data` is found

from data.common import DATA, VOCABULARY, InputError, Parser, load_data, load_tokenizer, read_txt, run

TINYSTORIES = "roneneldan/TinyStories"  # on Hugging Face (Eldan and Li 2023); or a folder with a copy


def read_rows(source, split):
    """Yield the column `text` of TinyStories, a .jsonl or a .parquet, read as a stream by Hugging Face datasets."""
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{source}: needs Hugging Face datasets ({error}); pip install datasets") from error
    for name in ("datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # errors are reported below
    file = dict(path="json" if source.endswith(".jsonl") else "parquet", data_files=glob.escape(source))
    dataset, kind = (dict(path=TINYSTORIES), OSError) if source == "tinystories" else (file, InputError)
    number = 0
    try:
        for number, row in enumerate(datasets.load_dataset(**dataset, split=split, streaming=True), start=1):
            if not isinstance(row.get("text"), str):
                raise InputError(f"{source}: row {number} has no string in a column `text`")
            yield row["text"]
    except InputError:
        raise
    except Exception as error:  # of datasets, pyarrow or the HTTP client: no common class
        raise kind(f"{source}: cannot be read from row {number + 1}: {str(error) or type(error).__name__}") from error


def read_stories(source, split="train"):
    """Iterate over the stories of TinyStories or a file. If there is only one, its last twentieth becomes a second."""
    texts = read_txt(source) if source.endswith(".txt") else read_rows(source, split)
    texts = filter(None, map(str.strip, texts))
    first, second = next(texts, ""), next(texts, "")
    if not second:
        cut = max(0, *(first.rfind(space, 0, len(first) - len(first) // 20) for space in " \n"))
        first, second = first[:cut], first[cut:]
    return chain([first, second], texts)


def write_story(seed, encoding, index):
    """-> the tokens of a story of the world, and its information content in nats."""
    from data.stories import Author  # here, because importing it parses world.txt

    story = Author(seed, index)
    return encoding.encode_ordinary(story.text), story.nats


def start_worker():
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # how Pool stops its workers; run() has given it a handler
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends its workers


def tokenize(source, stories, own_val, seed, encoding):
    """Yield (tokens, nats) of each story, those for validation last. nats: None for real text; own_val: see prepare."""
    if source == "stories":
        with Pool(initializer=start_worker) as pool:
            yield from pool.imap(partial(write_story, seed, encoding), range(stories), chunksize=500)
        return
    texts = islice(read_stories(source), stories)
    if source == "tinystories":  # which has a split for validation
        texts = chain(texts, islice(read_stories(source, "validation"), own_val))
    while batch := list(islice(texts, 256)):
        yield from ((tokens, None) for tokens in encoding.encode_ordinary_batch(batch))


def is_ready(folder, meta):
    """Does the folder hold this data set? Raises InputError if it holds anything else."""
    if others := {path.name for path in folder.glob("[!.]*")} - {"train.bin", "val.bin", "meta.json"}:
        raise InputError(f"{folder}: holds {min(others)}, which is not part of a data set; move it elsewhere")
    try:
        old = {} | json.loads((folder / "meta.json").read_text())
    except (OSError, ValueError, TypeError):  # nothing there, or damaged
        return False
    if differ := [key for key in meta if old.get(key) != meta[key]]:
        what = ", ".join(f"{k}={old[k]}" for k in ("source", "stories", "tokenizer", "seed") if old.get(k) is not None)
        why = {"world": ", made by another version of the world", "sha256": ", made from another text"}
        raise InputError(f"{folder}: holds {what}{why.get(differ[-1], '')}; delete or rename that folder first")
    try:
        return bool(load_data(folder))
    except InputError:  # damaged
        return False


def prepare(source="stories", stories=None, tokenizer=None, seed=0, root=DATA):
    """Write a data set to root/<name>/ and return that folder. If it is there already, do nothing.

    source: "stories", "tinystories" or a file; stories: how many (100,000, or all of a file); seed: of the world.
    The last twentieth, 1,000 stories at most, is for validation; TinyStories has a split of its own for that.
    Raises InputError for bad input or if the folder holds other data, OSError if the network or the disk fails."""
    path, is_file = Path(source), source not in ("stories", "tinystories")
    if is_file and (path.suffix not in (".txt", ".jsonl", ".parquet") or not path.is_file()):
        raise InputError(f"{source}: must be stories, tinystories or an existing .txt, .jsonl or .parquet file")
    if is_file and (path.stem in ("stories", "tinystories") or path.stem.startswith(".")):
        raise InputError(f"{source}: data/{path.stem} is not for files; rename the file")
    if stories is not None and not 2 <= stories < 2**32:
        raise InputError(f"--stories={stories}: must be at least 2, one to train and one to validate on, and < 2**32")
    stories = stories or (None if is_file else 100_000)
    encoding = load_tokenizer(tokenizer or ("stories" if source == "stories" else "gpt2"))
    meta = {"source": path.name, "stories": stories, "tokenizer": encoding.name}
    if source == "stories":
        world = b"".join(path.read_bytes() for path in (DATA / "stories.py", DATA / "world.txt", VOCABULARY))
        meta |= {"seed": seed, "world": hashlib.sha256(world).hexdigest()}
    elif is_file:
        with open(path, "rb") as file:
            meta["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    folder = Path(root) / path.stem
    if is_ready(folder, meta):
        print(f"{os.path.relpath(folder)} is ready")
        return folder
    with tempfile.TemporaryDirectory(prefix=f".{path.stem}-", dir=root) as temporary:
        scratch, end, lengths, nats = Path(temporary) / "data", encoding.eot_token, [], []
        scratch.mkdir()
        own_val = max(1, min(1000, (stories or 0) // 20))  # stories from TinyStories' validation split
        with open(scratch / "train.bin", "wb") as file:
            file.write(np.uint16(end).tobytes())
            documents = tokenize(source, stories, own_val, seed, encoding)
            for tokens, story_nats in tqdm(documents, total=stories, unit=" stories", mininterval=1):
                file.write(np.array([*tokens, end], dtype=np.uint16).tobytes())
                lengths.append(len(tokens) + 1)
                nats.append(story_nats)
        val_stories = own_val if source == "tinystories" else max(1, min(1000, len(lengths) // 20))
        train_stories = len(lengths) - val_stories
        if train_stories < 1 or min(lengths) < 2:
            raise InputError(f"{source}: too short: nothing to train on")
        train_tokens, val_tokens = sum(lengths[:train_stories]), sum(lengths[train_stories:])
        val = np.fromfile(scratch / "train.bin", np.uint16, offset=2 * train_tokens)  # from the last <|endoftext|> on
        val.tofile(scratch / "val.bin")
        os.truncate(scratch / "train.bin", 2 * train_tokens + 2)
        val_nats = nats[train_stories:] if source == "stories" else None
        meta |= dict(vocab_size=encoding.n_vocab, end=end, train_stories=train_stories, train_tokens=train_tokens)
        meta |= dict(val_stories=val_stories, val_tokens=val_tokens, val_nats=val_nats)
        meta["floor"] = sum(val_nats) / val_tokens if val_nats else None  # nats per token, <|endoftext|> included
        meta["val_bytes"] = len(encoding.decode_bytes(val[val != end].tolist()))
        (scratch / "meta.json").write_text(json.dumps(meta, indent=1))
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one
        os.replace(scratch, folder)
    print(f"{os.path.relpath(folder)}: {train_tokens:,} tokens to train on, {val_tokens:,} to validate on")
    if val_nats:
        print(f"floor {meta['floor']:.4f} nats per token, the loss of a perfect model")
    return folder


def main():
    example = "example: python data/prepare.py mine.txt --tokenizer=stories, then: python train.py --data=mine"
    parser = Parser(description="Write stories as tokens: data/<name>/train.bin, val.bin, meta.json.", epilog=example)
    parser.add_argument("source", nargs="?", default="stories", metavar="stories|tinystories|FILE", help=(
        "the world of data/stories.py (default), TinyStories (downloaded), a .txt with <|endoftext|> or blank lines "
        "between stories, or a .jsonl or .parquet with a column `text`"))  # fmt: skip
    parser.add_argument("--stories", type=int, help="how many (default: 100000, or all of a FILE)")
    parser.add_argument("--tokenizer", help="stories, gpt2 (default for all but stories), or another of tiktoken's")
    parser.add_argument("--seed", type=int, default=0, help="seed of the story world (default: 0)")
    prepare(**vars(parser.parse_args()))


if __name__ == "__main__":
    run(main)
