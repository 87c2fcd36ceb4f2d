# SPDX-License-Identifier: Apache-2.0
"""`mcmoe push`: a packed model, its report and a model card to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from transformers_mcmoe.cli.command import Refused, command
from transformers_mcmoe.cli.console import say, show, show_json
from transformers_mcmoe.integrations.hub import push_folder, write_card


@command("push", "Use")
def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a packed model.", show_default=False)],
    repo_id: Annotated[str, typer.Argument(help="Repository on the Hub, owner/name.", show_default=False)],
    *,
    base_model: Annotated[
        str | None,
        typer.Option(help="Hub id of the dense model, or its folder for the licence; default what it was made from."),
    ] = None,
    license: Annotated[str | None, typer.Option(help="Licence by its Hub name; default the dense model's.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; made if need be.")] = None,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    token: Annotated[str | None, typer.Option(help="Hub token; default the one logged in, or HF_TOKEN.")] = None,
    card_only: Annotated[
        Path | None, typer.Option(help="Write the card and its figures into this folder, and upload nothing.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the commit as JSON.")] = False,
) -> None:
    """Upload a packed model from FOLDER with tokenizer, report, evaluation and a model card made from them.

    The card states only what was measured: run `mcmoe evaluate` first. A README.md of your own in FOLDER is left as it is.
    """
    if not folder.is_dir():
        raise Refused(f"There is no folder '{folder}'; give the one that mcmoe compress wrote.")
    if card_only is not None:
        card_only.mkdir(parents=True, exist_ok=True)
        facts = {"license": license} if license else {}
        write_card(folder, card_only, repo_id, base_model=base_model, facts=facts, token=token)
        if not (card_only / "README.md").is_file():
            raise Refused(f"'{folder / 'README.md'}' is a card of your own; it would be uploaded as it is.")
        show(str(card_only / "README.md"))
        return
    done = push_folder(
        folder,
        repo_id,
        base_model=base_model,
        license=license,
        private=private or None,
        token=token,
        revision=revision,
        commit_message=message,
        create_pr=create_pr,
    )
    if as_json:
        show_json({"commit": done.oid, "url": done.commit_url})
    else:
        say(f"Uploaded {folder}.")
        show(done.commit_url)
