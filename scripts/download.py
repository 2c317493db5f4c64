"""Download a repository of ModelScope or Hugging Face into a folder, once.

    python scripts/download.py --hub modelscope --repo iic/CosyVoice2-0.5B --output-dir DIR --require flow.pt hift.pt

The hubs' own libraries resume what was cut off and compare sizes and checksums where the hub gives them. A folder
that a finished download has marked, and whose files still have their sizes, is left alone. The libraries' settings
for mirrors and tokens work: MODELSCOPE_ENDPOINT, MODELSCOPE_API_TOKEN, HF_ENDPOINT, HF_TOKEN.
"""

import argparse
import errno
import json
import shutil
from pathlib import Path

from tts_grpo.text.jsonl import write_json

MARKER = ".downloaded.json"
GIB = 1 << 30
HINTS = {  # exception class, wherever it stands in the chain of causes -> what to do
    "GatedRepoError": "the repository is gated: ask for access on its page and set HF_TOKEN",
    "AuthenticationError": "the hub wants a login: set MODELSCOPE_API_TOKEN",
    "PermissionDeniedError": "the hub refuses access: ask for it on the repository's page",
    "RepositoryNotFoundError": "there is no such repository, or it is private: check --repo, or set HF_TOKEN",
    "RevisionNotFoundError": "the repository has no such revision: check --revision",
    "NotExistError": "there is no such repository or revision: check --repo and --revision",
    "FileDownloadError": "a file did not arrive as the hub lists it (below): run it again, it resumes",
}
OFFLINE = "the hub cannot be reached: check the network or the mirror's address, then run it again: it resumes"


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hub", choices=("modelscope", "huggingface"), required=True, help="where it is")
    parser.add_argument("--repo", required=True, help="owner/name")
    parser.add_argument("--repo-type", choices=("model", "dataset"), default="model", help="kind of repository")
    parser.add_argument("--revision", default=None, help="branch, tag or commit; the hub's default otherwise")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder to fill")
    parser.add_argument("--include", nargs="+", default=None, help="patterns of the files wanted; all otherwise")
    parser.add_argument("--require", nargs="+", default=[], help="files that must be there in the end")
    parser.add_argument("--need-gib", type=float, default=1.0, help="free space to ask for before beginning")
    return parser.parse_args(argv)


def wanted(args) -> dict:
    """What the marker says was downloaded."""
    return {name: getattr(args, name) for name in ("hub", "repo", "repo_type", "revision", "include")}


def sizes(folder: Path) -> dict[str, int]:
    """Size of each file under a folder, without hidden ones."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    relative = {path: path.relative_to(folder) for path in paths}
    return {str(r): path.stat().st_size for path, r in relative.items() if not any(p[0] == "." for p in r.parts)}


def is_done(args) -> bool:
    """Whether the folder is a finished download of the same files."""
    marker = args.output_dir / MARKER
    if not marker.exists():
        return False
    saved, there = json.loads(marker.read_text(encoding="utf-8")), sizes(args.output_dir)
    same = all(there.get(name) == size for name, size in saved["sizes"].items())
    return same and saved["wanted"] == wanted(args) and all(name in saved["sizes"] for name in args.require)


def drop_changed(folder: Path) -> None:
    """Remove files that have no longer the size they were downloaded with: Hugging Face's library would keep them."""
    marker = folder / MARKER
    if marker.exists():
        saved, there = json.loads(marker.read_text(encoding="utf-8"))["sizes"], sizes(folder)
        for name in saved.keys() & there.keys():
            if there[name] != saved[name]:
                (folder / name).unlink()
        marker.unlink()


def check_space(args) -> None:
    """Stop if the disk has less than --need-gib free beside what is there already."""
    folder = next(p for p in (args.output_dir, *args.output_dir.resolve().parents) if p.exists())
    have = sum(sizes(args.output_dir).values()) / GIB if args.output_dir.exists() else 0.0
    free = shutil.disk_usage(folder).free / GIB
    if free + have < args.need_gib:
        raise SystemExit(
            f"download.py: {args.repo} needs {args.need_gib:.1f} GiB, {args.output_dir} has {free:.1f} GiB free: "
            "make room or choose another folder"
        )


def fetch(args) -> None:
    """Let the hub's library fill the folder."""
    if args.hub == "modelscope":
        from modelscope import snapshot_download
    else:
        from huggingface_hub import snapshot_download
    snapshot_download(
        args.repo, repo_type=args.repo_type, revision=args.revision, local_dir=str(args.output_dir),
        allow_patterns=args.include,
    )  # fmt: skip


def top_level(args) -> str:
    """What a repository of Hugging Face holds at its top level, for an error message; nothing if it cannot be had."""
    if args.hub != "huggingface":
        return ""
    from huggingface_hub import list_repo_files

    try:
        files = list_repo_files(args.repo, repo_type=args.repo_type, revision=args.revision)
    except Exception:  # the message that it would complete says enough
        return ""
    return f" It holds {', '.join(sorted({name.split('/')[0] for name in files}))}."


def causes(error: BaseException) -> list[BaseException]:
    """An exception and what it was raised from."""
    chain = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def hint(error: BaseException) -> str:
    """What to do about a failed download."""
    chain = causes(error)
    if any(isinstance(e, OSError) and e.errno == errno.ENOSPC for e in chain):
        return "the disk is full: make room, then run it again: it resumes"
    names = [cls.__name__ for e in chain for cls in type(e).__mro__]
    return next((text for name, text in HINTS.items() if name in names), OFFLINE)


def main(argv=None):
    args = get_args(argv)
    if is_done(args):
        print(f"{args.repo}: there already, {args.output_dir}")
        return
    check_space(args)
    drop_changed(args.output_dir)
    try:
        fetch(args)
    except Exception as error:
        raise SystemExit(f"download.py: {args.repo}: {hint(error)}\n({type(error).__name__}: {error})") from error
    there = sizes(args.output_dir)
    missing = [name for name in args.require if not there.get(name)]
    if missing:
        names = ", ".join(missing)
        raise SystemExit(
            f"download.py: {args.repo} came without {names} (missing or empty): is it the right one?{top_level(args)}"
        )
    write_json(args.output_dir / MARKER, {"wanted": wanted(args), "sizes": there})
    print(f"{args.repo}: {sum(there.values()) / GIB:.2f} GiB in {args.output_dir}")


if __name__ == "__main__":
    main()
