"""Commands that make a candidate otherwise than by training, and judge it."""

import functools
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from graceful.flows.cli.shell import (
    ByOption,
    JsonOption,
    ReasonOption,
    RootOption,
    app,
    console_for,
    exit_code_of,
    flow_server_for,
    output,
    place,
    print_update,
    reported_errors,
)

command = functools.partial(app.command, rich_help_panel="Updates")


@command()
def adopt(
    name: Annotated[str, typer.Argument(help="What to call the encoder; it stands in the lineage.")],
    factory: Annotated[
        str,
        typer.Option(
            "--from",
            "--factory",
            help="'timm/NAME', 'torchvision/NAME', or 'package.module:function' that returns a torch module "
            "(n, c, h, w) -> (n, d).",
        ),
    ],
    root: RootOption = ".",
    weights: Annotated[
        str | None, typer.Option(help="File of weights to load into it; by default a library's pretrained ones.")
    ] = None,
    kwargs: Annotated[str, typer.Option(help="Arguments of the factory, as JSON.")] = "{}",
    image_size: Annotated[
        int | None, typer.Option(help="Pixels it takes; by default its library's, or the configuration's.")
    ] = None,
    channels: Annotated[int | None, typer.Option(help="1 for grey, 3 for RGB.")] = None,
    mean: Annotated[list[float] | None, typer.Option(help="Mean per channel, 0 to 1; once for each.")] = None,
    std: Annotated[list[float] | None, typer.Option(help="Standard deviation per channel; once for each.")] = None,
    preprocessing: Annotated[
        str, typer.Option(help="Other values of its preprocessing, as JSON: resize, resize_size, interpolation, ...")
    ] = "{}",
    as_json: JsonOption = False,
) -> None:
    """Judge an encoder that was trained elsewhere, and roll it out if the gate says so.

    It is tried on a few images before anything is recorded. Any width will do: what it cannot be compared with, it has
    to re-embed. Exit code 3: hold, 4: inconclusive, 5: waiting for a person.
    """
    with reported_errors(as_json):
        from graceful.flows.commands.check import require_checked

        require_checked(place(root), factory)
    with reported_errors(as_json), flow_server_for(place(root), as_json):
        from graceful.flows.commands.updates import adopt_encoder, update_workspace

        given = {"image_size": image_size, "channels": channels, "mean": mean, "std": std}
        stated = {key: value for key, value in given.items() if value not in (None, [])}
        adopted = adopt_encoder(place(root), name, factory, weights, kwargs, stated, preprocessing)
        result = update_workspace(place(root), console_for(as_json), adopted=adopted)
        output(as_json, result.model_dump(mode="json"), lambda console: print_update(console, result, place(root)))
        raise typer.Exit(exit_code_of(result))


@command("forget-training")
def forget_training(
    images: Annotated[
        list[str],
        typer.Argument(help="Training images: a source as in the training data, a file, or the SHA-256 of its bytes."),
    ],
    reason: ReasonOption,
    root: RootOption = ".",
    by: ByOption = "",
    as_json: JsonOption = False,
) -> None:
    """Withdraw images from training for good, and judge the champion without them, computed and not trained.

    Says how far they can still be told from images that were never seen. No later training sees them, whatever the gate
    says now. The images must still be there while it runs. Exit code 3: hold, 4: inconclusive, 5: waiting for a person.
    """
    with reported_errors(as_json), flow_server_for(place(root), as_json):
        from graceful.flows.commands.forgetting import forget_training as forget
        from graceful.flows.terminal import print_traces

        named = [place(image) if Path(image).exists() else image for image in images]
        result, left = forget(place(root), named, console_for(as_json), reason=reason, by=by)

        def text(console: Console) -> None:
            print_update(console, result, place(root))
            print_traces(console, left)

        output(as_json, {**result.model_dump(mode="json"), **left}, text)
        raise typer.Exit(exit_code_of(result))
