"""Push a proven bundle, its adapter or its merged model to a model hub, with card and proof.

    python publish.py liteguard_phi2.litertlm --to me/liteguard-phi2 --dry_run
    python publish.py liteguard_phi2.litertlm --to me/liteguard-phi2 --private
    python publish.py liteguard_phi2.task --to me/liteguard-phi2-lora --what adapter
    python publish.py liteguard_phi2.task --to me/liteguard-phi2-merged --what merged

A bundle vouches for what it was made from: nothing goes up unless its proof passed, its files are
those of its record, and the evaluation (evaluate_model.py) measured exactly them. The card has the
base model, the licence and the numbers as metadata that the hub reads.

The token comes from HF_TOKEN or `hf auth login` and is never printed. All files go up in one
commit, into a repository that is private at first; the commit is read back, and only when every
sha256 equals the local one is the repository made public, unless --private.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from liteguard import cli
from liteguard.errors import UserError

KINDS = ("bundle", "adapter", "merged")


def parse_args():
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", help="a .task or .litertlm file that passed its proof")
    add("--to", metavar="OWNER/NAME", required=True, help="repository; made if it is not there")
    add("--what", choices=KINDS, default="bundle", help="what goes up (default: the bundle)")
    add("--private", action="store_true", help="keep the repository private")
    add("--evaluation", metavar="DIR", default="evaluation", help="where the results are")
    return parser.parse_args()


def main() -> None:
    # 1. Configuration
    args = parse_args()
    from liteguard.publishing import package, upload

    upload.check_name(args.to)
    bundle = Path(args.bundle)
    if bundle.suffix not in (".task", ".litertlm"):
        raise UserError(f"{bundle}: name a bundle (.task or .litertlm); it has the proof.")
    source = package.proven(bundle, args.what)
    config = cli.resolve_config(args, parent=source.stage_record or source.record)

    # 2. Inputs
    facts = package.measured(source, Path(args.evaluation))
    card = package.readme(source, facts, args.to)
    print(f"proof: passed; verdict: {facts['verdict'].headline}")
    with tempfile.TemporaryDirectory(prefix=".publish.", dir=bundle.parent) as folder:
        work = Path(folder)
        if args.dry_run:
            files = package.collect(source, config, card, work, merge=False, repository=args.to)
            print(f"{card.split('---')[1].strip()}\n\nwould go up to {args.to}:")
            print(upload.listing(files))
            if args.what == "merged":
                print("  and the merged model's files, which are made when it is published")
            print("dry run: nothing uploaded")
            return
        hub = upload.Hub(args.to)

        # 3. Work
        files = package.collect(source, config, card, work, repository=args.to)
        print(upload.listing(files))
        made, hidden = hub.prepare(args.private)
        commit = hub.send(files, f"{args.what} {bundle.name}, proven by LiteGuard")
        hub.check(files, commit)
        if made and not args.private:
            hub.open_to_all()
            hidden = False

    # 4. Results
    print(f"{len(files)} files, every sha256 as here; commit {commit}")
    print(f"published by {hub.account}: {hub.endpoint}/{args.to}")
    if hidden and not args.private:
        print(
            f"{args.to} was there and is private, so nobody else sees it: open it on "
            f"{hub.endpoint}/{args.to}/settings"
        )


if __name__ == "__main__":
    cli.run(main)
