"""``fasp report``: one HTML page from a folder that another command wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from fasp_lightning.cli.console import results
from fasp_lightning.cli.page.gather import gather
from fasp_lightning.cli.page.render import chapters, render
from fasp_lightning.cli.quiet import quiet_libraries
from fasp_lightning.errors import FaspError, FaspFileExistsError
from fasp_lightning.staging import claimed, write_beside


@dataclass(frozen=True)
class ReportJob:
    """Make one HTML page, which needs no other file, of a pruned model, a training run or a sweep.

    Attributes:
        folder: What fasp prune, fit or sweep wrote: the folder of a pruned model, of a run or above a run, or of a
            sweep.
        output: The page.
        overwrite: Replace a file that is there.
    """

    POSITIONAL: ClassVar[bool] = True

    folder: str
    output: str = "report.html"
    overwrite: bool = False

    def __post_init__(self) -> None:
        if Path(self.output).suffix.lower() not in (".html", ".htm"):
            raise FaspError(f"output must be a file named .html, got {self.output!r}")


JOB = ReportJob


def run(job: ReportJob) -> int:
    """Run the command; returns the exit code."""
    quiet_libraries()
    output = Path(job.output).expanduser()
    if output.is_dir() or (output.exists() and not job.overwrite):
        raise FaspFileExistsError(f"output {job.output!r} must not be there; choose another one, or overwrite a file")
    with claimed(output):
        told = chapters(gather(Path(job.folder).expanduser()))
        write_beside(output, render(told).encode())
    console = results()
    for chapter in told:
        console.print(f"{chapter.title}: {chapter.subtitle}", soft_wrap=True)
    console.print(f"{output}, {output.stat().st_size / 1e3:,.0f} kB", soft_wrap=True)
    return 0
