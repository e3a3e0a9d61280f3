"""Text to tokens: python data/prepare.py [stories|tinystories|FILE.txt] writes train.bin, val.bin and meta.json.

Both .bin files are one stream of uint16 tokens: <|endoftext|>, a story, <|endoftext|>, a story, ..., <|endoftext|>.
"""

import argparse
import base64
import hashlib
import http.client
import itertools
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import textwrap
import urllib.request
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

DATA = Path(__file__).parent
VOCABULARY = DATA / "stories.tiktoken"  # made by: python data/stories.py vocabulary
PATTERN = r" ?[^\W\d_]+| ?\d+| ?(?:[^\w\s]|_)+|\s+"  # words, numbers, punctuation, each with the space before it
END = "<|endoftext|>"
TINYSTORIES = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/TinyStories-train.txt"


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line as ValueError; a mistyped flag is never taken for the one that it begins."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(self, args=None, namespace=None):
        for word in sys.argv[1:] if args is None else args:
            if word.startswith("--") and word.endswith("=--"):  # argparse takes the value away, and the type with it
                self.error(f"{word}: no value")
        return super().parse_known_args(args, namespace)

    def error(self, message):
        raise ValueError(f"{message} (see --help)")


def run(main):
    """Run a script's main(). Bad input ends in one line on stderr and exit status 2, a failure in status 1."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is half-done is cleared away
    try:
        return main()
    except ValueError as error:
        status, message = 2, str(error)
    except BrokenPipeError:  # of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    except (OSError, FloatingPointError) as error:
        status, message = 1, str(error)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        status, message = 1, f"not enough memory; choose a smaller size, batch or context ({str(error)[:150]})"
    except KeyboardInterrupt:
        status, message = 130, "interrupted"
    print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


def wrap(text):
    """Text in lines of 80 columns, broken between words."""
    return "\n".join(textwrap.fill(line, 80, break_on_hyphens=False) for line in text.split("\n"))


def check_device(device):
    """Raise ValueError if there is no such device on this machine."""
    import torch  # here, because making data needs no torch

    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device={device}: not available: {str(error).splitlines()[0]}") from error


def fast_bfloat16(device):
    """Does this device multiply matrices faster in bfloat16 than in float32?"""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of PyTorch do not have it
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def load_tokenizer(name):
    """The tiktoken.Encoding of that name: "stories" (ships with this file) or "gpt2" (downloaded once by tiktoken)."""
    if name == "stories":
        try:
            lines = VOCABULARY.read_text(encoding="ascii").splitlines()
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in map(str.split, lines)}
            bytes_are_there = all(bytes([i]) in ranks for i in range(256))
            if sorted(ranks.values()) != list(range(len(lines))) or not bytes_are_there:
                raise ValueError("ranks or bytes are missing")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{VOCABULARY}: damaged ({error}); make it with: python data/stories.py vocabulary"
            ) from error
        return tiktoken.Encoding(name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={END: len(ranks)})
    if name == "gpt2":
        try:
            return tiktoken.get_encoding(name)
        except OSError as error:
            raise OSError(
                "the gpt2 tokenizer could not be downloaded; go online once, or use --tokenizer=stories"
            ) from error
    raise ValueError(f"tokenizer {name!r}: must be stories or gpt2")


def split_documents(text):
    """Stories in a text file: between <|endoftext|>, or else between blank lines. A single one is cut near its end."""
    documents = text.split(END) if END in text else re.split(r"\n\s*\n", text)
    documents = [document.strip() for document in documents if document.strip()]
    if len(documents) == 1:
        words = re.findall(r"\S+\s*", documents[0])
        cut = len(words) - max(1, len(words) // 20)
        documents = [text for text in ("".join(words[:cut]), "".join(words[cut:])) if text]
    return documents


def download_tinystories(count):
    """The first `count` stories of TinyStories (Eldan and Li 2023): about 0.9 KB each, read no further than needed."""
    stories, lines = [], []
    try:
        with urllib.request.urlopen(TINYSTORIES, timeout=30) as response, tqdm(total=count, unit=" stories") as bar:
            while len(stories) < count and (line := response.readline().decode()):
                lines.append(line)
                if line.strip() == END:
                    stories.append("".join(lines[:-1]).strip())
                    lines = []
                    bar.update()
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"no TinyStories: cannot read {TINYSTORIES}: {error}") from error
    if len(stories) < count:
        raise OSError(
            f"only {len(stories)} of {count} stories came from {TINYSTORIES}; try again, or with fewer --stories"
        )
    return stories


def tokenize(texts, tokenizer):
    """Yield (tokens, None) of each text: nobody knows what these authors chose from."""
    for start in tqdm(range(0, len(texts), 1000), unit="k stories", desc="tokenizing"):
        yield from ((tokens, None) for tokens in tokenizer.encode_ordinary_batch(texts[start : start + 1000]))


def write_stories(job):
    """A job (seed, indices, tokenizer's name) -> the tokens of each story, and its information content in nats."""
    from data.stories import Author  # here, because it reads the whole world

    seed, indices, tokenizer = job
    encode = load_tokenizer(tokenizer).encode_ordinary
    stories = [Author(seed, index) for index in indices]
    return [encode(story.text) for story in stories], [story.nats for story in stories]


def invent(count, seed, tokenizer):
    """Yield (tokens, nats) of each story of the world, written on all cores."""
    jobs = [(seed, range(start, min(start + 500, count)), tokenizer.name) for start in range(0, count, 500)]
    default = (signal.SIGTERM, signal.SIG_DFL)  # Pool ends its workers by it, and run() above has changed its meaning
    with Pool(None, signal.signal, default) as pool, tqdm(total=count, unit=" stories", mininterval=1) as bar:
        for tokens, nats in pool.imap(write_stories, jobs):
            bar.update(len(tokens))
            yield from zip(tokens, nats, strict=True)
        pool.close()  # all is written: the workers end by themselves
        pool.join()


def prepare(source="stories", stories=None, tokenizer=None, seed=0, root=DATA):
    """Write a data set to root/<name>/ and return that folder. If the same is there already, do nothing.

    source: "stories", "tinystories" or a text file; stories: how many (100,000, or all of a file); seed: of the world.
    The last twentieth, 1,000 stories at most, is for validation. The folder appears only when it is whole.
    Raises ValueError for bad input, OSError if the network or the disk fails."""
    is_file = source not in ("stories", "tinystories")
    name = Path(source).stem if is_file else source
    if is_file and name in ("stories", "tinystories"):
        raise ValueError(f"{source}: that name is taken by data/{name}; rename the file")
    if name.startswith(".") or not name:
        raise ValueError(f"{source}: no name for a data folder; rename the file")
    if stories is not None and stories < 2:
        raise ValueError(f"--stories={stories}: must be at least 2, one to train on and one to validate")
    stories = stories or (None if is_file else 100_000)
    if is_file:
        try:
            text = Path(source).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{source}: cannot be read as text: {error}") from error
    encoding = load_tokenizer(tokenizer or ("stories" if source == "stories" else "gpt2"))
    meta = {"source": Path(source).name, "stories": stories, "tokenizer": encoding.name}
    if source == "stories":
        made_by = (DATA / "stories.py", DATA / "world.txt", VOCABULARY)
        meta |= {"seed": seed, "world": hashlib.sha256(b"".join(path.read_bytes() for path in made_by)).hexdigest()}
    elif is_file:
        meta["sha256"] = hashlib.sha256(text.encode()).hexdigest()

    folder = Path(root) / name
    if folder.exists():
        if extra := {path.name for path in folder.iterdir()} - {"train.bin", "val.bin", "meta.json"}:
            raise ValueError(f"{folder}: holds {min(extra)}, which is no data; it would be lost: move it elsewhere")
        try:
            old = load_data(folder)[0]
        except ValueError:
            old = {}  # damaged: make it again
        if all(old.get(key) == value for key, value in meta.items()):
            print(f"{os.path.relpath(folder)} is ready")
            return folder
    if source == "stories":
        documents = invent(stories, seed, encoding)
    else:
        texts = split_documents(text)[:stories] if is_file else download_tinystories(stories)
        if len(texts) < 2:
            raise ValueError(f"{source}: too short: nothing to validate on")
        documents, stories = tokenize(texts, encoding), len(texts)

    scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=root))
    try:
        val_stories = max(1, min(1000, stories // 20))
        end = np.array([encoding.eot_token], dtype=np.uint16)
        for split, count in (("train", stories - val_stories), ("val", val_stories)):
            tokens, nats = 0, []
            with open(scratch / f"{split}.bin", "wb") as file:
                end.tofile(file)
                for story, story_nats in itertools.islice(documents, count):
                    np.array([*story, encoding.eot_token], dtype=np.uint16).tofile(file)
                    tokens += len(story) + 1
                    nats.append(story_nats)
            meta |= {f"{split}_stories": count, f"{split}_tokens": tokens}
        next(documents, None)  # lets it come to its end, and close its progress bar, before anything is printed
        known = source == "stories"  # nats per token, the end included: what a perfect model would lose on val.bin
        meta |= {"vocab_size": encoding.n_vocab, "floor": sum(nats) / tokens if known else None}
        meta["val_nats"] = nats if known else None
        (scratch / "meta.json").write_text(json.dumps(meta, indent=1))
        scratch.chmod(0o755)  # mkdtemp is for its owner alone
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    sizes = f"{meta['train_tokens']:,} tokens to train on, {meta['val_tokens']:,} to validate on"
    print(f"{os.path.relpath(folder)}: {sizes}")
    if known:
        print(f"floor {meta['floor']:.4f} nats per token, the loss of a perfect model")
    return folder


def check_meta(meta):
    """Raise ValueError that names what is wrong with the contents of a meta.json."""

    def is_count(value):
        return type(value) is int and value > 0

    def is_nats(value):
        return type(value) in (int, float) and 0 <= value < float("inf")

    nats = meta["val_nats"]
    whole = {
        "source": type(meta["source"]) is str,
        "tokenizer": meta["tokenizer"] in ("stories", "gpt2"),
        "vocab_size": is_count(meta["vocab_size"]) and meta["vocab_size"] <= 65535,
        "floor": meta["floor"] is None if nats is None else is_nats(meta["floor"]),
        "val_nats": nats is None or type(nats) is list and len(nats) == meta["val_stories"] and all(map(is_nats, nats)),
    } | {f"{split}_{of}": is_count(meta[f"{split}_{of}"]) for split in ("train", "val") for of in ("tokens", "stories")}
    if wrong := [key for key, right in whole.items() if not right]:
        raise ValueError(f"meta.json: {wrong[0]}={str(meta[wrong[0]])[:50]}")


def load_data(folder):
    """A folder that prepare() wrote -> meta (a dict), train and val (memory-mapped uint16). ValueError if damaged."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such data folder; data/prepare.py makes them, such as data/mine from mine.txt")
    try:
        meta = json.loads((folder / "meta.json").read_text())
        check_meta(meta)
        splits = [np.memmap(folder / f"{split}.bin", dtype=np.uint16, mode="r") for split in ("train", "val")]
        lengths = [meta[f"{split}_tokens"] + 1 for split in ("train", "val")]
        end = meta["vocab_size"] - 1  # in both tokenizers the last token
        ends = [np.count_nonzero(tokens == end) - 1 for tokens in splits]
        whole = [len(tokens) for tokens in splits] == lengths and max(map(np.max, splits)) == end
        whole = whole and ends == [meta[f"{split}_stories"] for split in ("train", "val")]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder}: not whole ({error}); make it with data/prepare.py") from error
    if not whole:
        raise ValueError(f"{folder}: .bin files and meta.json do not fit together; make it again with data/prepare.py")
    return meta, *splits


def main():
    parser = Parser(
        description="Turn stories into tokens: writes train.bin, val.bin and meta.json into data/<name>/.",
        epilog="example: python data/prepare.py mine.txt --tokenizer=stories, then: python train.py --data=mine",
    )
    parser.add_argument("source", nargs="?", default="stories", metavar="stories|tinystories|FILE.txt", help=(
        "the story world of data/stories.py (default), the TinyStories data set (downloaded), or your own text: "
        "stories with <|endoftext|> or blank lines between them"))  # fmt: skip
    parser.add_argument("--stories", type=int, help="how many (default: 100000; of a FILE.txt, all)")
    parser.add_argument("--tokenizer", choices=("stories", "gpt2"), help="default: stories for stories, otherwise gpt2")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other stories of the world (default: 0)")
    args = parser.parse_args()
    prepare(args.source, args.stories, args.tokenizer, args.seed)


if __name__ == "__main__":
    sys.path.insert(0, str(DATA.parent))  # where the package `data` is found
    run(main)
