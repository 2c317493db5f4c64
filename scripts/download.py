"""Download a repository from ModelScope or Hugging Face to a folder, unless that is done already.

    python scripts/download.py --hub modelscope --repo iic/CosyVoice2-0.5B --output-dir DIR --require flow.pt hift.pt

The hubs' own libraries resume interrupted downloads and verify sizes and checksums where the hub provides them. A
finished download writes a marker; a folder with a marker, whose files have the recorded sizes, is not downloaded again.
A folder keeps what was downloaded to it with other --include patterns.
The libraries' settings for mirrors and tokens work: MODELSCOPE_ENDPOINT, MODELSCOPE_API_TOKEN, HF_ENDPOINT, HF_TOKEN.
"""

import argparse
import errno
import json
import shutil
from pathlib import Path

from tts_grpo.text.jsonl import write_json

MARKER = ".downloaded.json"
GIB = 1 << 30
HINTS = {  # name of an exception class anywhere in the chain of causes -> advice
    "GatedRepoError": "the repository is gated: request access on its page and set HF_TOKEN",
    "AuthenticationError": "the hub requires a login: set MODELSCOPE_API_TOKEN",
    "PermissionDeniedError": "the hub denies access: request access on the repository's page",
    "RepositoryNotFoundError": "no such repository, or it is private: check --repo, or set HF_TOKEN",
    "RevisionNotFoundError": "the repository has no such revision: check --revision",
    "NotExistError": "no such repository or revision: check --repo and --revision",
    "FileDownloadError": "a downloaded file differs from the hub's listing (below): run the command again to resume",
}
OFFLINE = "the hub cannot be reached: check the network or the mirror's address, then run the command again to resume"


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hub", choices=("modelscope", "huggingface"), required=True, help="hub to download from")
    parser.add_argument("--repo", required=True, help="owner/name")
    parser.add_argument("--repo-type", choices=("model", "dataset"), default="model", help="kind of repository")
    parser.add_argument("--revision", default=None, help="branch, tag or commit (default: the hub's default)")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder to write to")
    parser.add_argument("--include", nargs="+", default=None, help="patterns of files to download (default: all)")
    parser.add_argument("--require", nargs="+", default=[], help="files that the download must contain")
    parser.add_argument("--need-gib", type=float, default=1.0, help="required disk space")
    return parser.parse_args(argv)


def request(args) -> dict:
    """The arguments that the marker records."""
    return {name: getattr(args, name) for name in ("hub", "repo", "repo_type", "revision", "include")}


def sizes(folder: Path) -> dict[str, int]:
    """Size of each file in a folder and its subfolders, without hidden files."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    relative = {path: path.relative_to(folder) for path in paths}
    return {str(r): path.stat().st_size for path, r in relative.items() if not any(p[0] == "." for p in r.parts)}


def with_earlier(args) -> list[str] | None:
    """The patterns to download, and those with which the folder was downloaded from this repository before."""
    marker = args.output_dir / MARKER
    earlier = json.loads(marker.read_text(encoding="utf-8"))["wanted"] if marker.exists() else {}
    if not earlier or earlier | {"include": None} != request(args) | {"include": None}:
        return args.include
    if args.include is None or earlier["include"] is None:
        return None
    return list(dict.fromkeys([*earlier["include"], *args.include]))


def is_done(args) -> bool:
    """Whether the folder contains a finished download with the same arguments."""
    marker = args.output_dir / MARKER
    if not marker.exists():
        return False
    saved, present = json.loads(marker.read_text(encoding="utf-8")), sizes(args.output_dir)
    same = all(present.get(name) == size for name, size in saved["sizes"].items())
    return same and saved["wanted"] == request(args) and all(name in saved["sizes"] for name in args.require)


def remove_changed(folder: Path) -> None:
    """Remove files whose size has changed since the download; Hugging Face's library would keep them."""
    marker = folder / MARKER
    if marker.exists():
        saved, present = json.loads(marker.read_text(encoding="utf-8"))["sizes"], sizes(folder)
        for name in saved.keys() & present.keys():
            if present[name] != saved[name]:
                (folder / name).unlink()
        marker.unlink()


def check_space(args) -> None:
    """Exit if free space plus the size of existing files is below --need-gib."""
    folder = next(p for p in (args.output_dir, *args.output_dir.resolve().parents) if p.exists())
    present = sum(sizes(args.output_dir).values()) / GIB if args.output_dir.exists() else 0.0
    free = shutil.disk_usage(folder).free / GIB
    if free + present < args.need_gib:
        raise SystemExit(
            f"download.py: {args.repo} needs {args.need_gib:.1f} GiB, but {args.output_dir} has {free:.1f} GiB free: "
            "free some space or choose another folder"
        )


def fetch(args) -> None:
    """Download with the hub's library."""
    if args.hub == "modelscope":
        from modelscope import snapshot_download
    else:
        from huggingface_hub import snapshot_download
    snapshot_download(
        args.repo, repo_type=args.repo_type, revision=args.revision, local_dir=str(args.output_dir),
        allow_patterns=args.include,
    )  # fmt: skip


def top_level(args) -> str:
    """Sentence with the top-level content of a Hugging Face repository, or "" if it cannot be listed."""
    if args.hub != "huggingface":
        return ""
    from huggingface_hub import list_repo_files

    try:
        files = list_repo_files(args.repo, repo_type=args.repo_type, revision=args.revision)
    except Exception:  # this only adds information to another error message
        return ""
    return f" It contains {', '.join(sorted({name.split('/')[0] for name in files}))}."


def causes(error: BaseException) -> list[BaseException]:
    """An exception and its chain of causes."""
    chain = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def hint(error: BaseException) -> str:
    """Advice for a failed download."""
    chain = causes(error)
    if any(isinstance(e, OSError) and e.errno == errno.ENOSPC for e in chain):
        return "the disk is full: free some space, then run the command again to resume"
    names = [cls.__name__ for e in chain for cls in type(e).__mro__]
    return next((text for name, text in HINTS.items() if name in names), OFFLINE)


def main(argv=None):
    args = get_args(argv)
    args.include = with_earlier(args)
    if is_done(args):
        print(f"{args.repo}: already downloaded to {args.output_dir}")
        return
    check_space(args)
    remove_changed(args.output_dir)
    try:
        fetch(args)
    except Exception as error:
        raise SystemExit(f"download.py: {args.repo}: {hint(error)}\n({type(error).__name__}: {error})") from error
    present = sizes(args.output_dir)
    missing = [name for name in args.require if not present.get(name)]
    if missing:
        names = ", ".join(missing)
        raise SystemExit(
            f"download.py: {names} missing or empty in {args.repo}: is it the right repository?{top_level(args)}"
        )
    write_json(args.output_dir / MARKER, {"wanted": request(args), "sizes": present})
    print(f"{args.repo}: {sum(present.values()) / GIB:.2f} GiB in {args.output_dir}")


if __name__ == "__main__":
    main()
