//! The report in Markdown: the table, what the targets say to it, and what it was measured on.

use std::fmt::Write;
use std::time::Duration;

use crate::cases::{Measured, Outcome};
use crate::measure::Figures;

pub struct Facts {
    /// Lines of "name: value".
    pub lines: Vec<(String, String)>,
}

pub fn write(outcomes: &[Outcome], facts: &Facts) -> String {
    let mut text = String::new();
    table(&mut text, outcomes);
    answers(&mut text, outcomes);
    failures(&mut text, outcomes);
    crate::targets::verdicts(&mut text, outcomes);
    text.push_str("\n### Measured on\n\n");
    for (name, value) in &facts.lines {
        let _ = writeln!(text, "- {name}: {value}");
    }
    text.push_str(NOTES);
    text
}

const NOTES: &str = "
Seconds are wall time from the first client's start to the last one's end, the median of the rounds (short cases are
repeated up to 20 times, 3 times when cold). A clone is what a client does: capabilities, reference list, pack. The
client checks the pack's checksum and discards the pack, on the same cores as the server; computing checksums costs it
more than nginx needs to send a file, so full clones are measured once more without that. Cold: a service just started
on a mirror without any finished answer, after one request for HEAD. Warm: the repository is in `warm`, and the same was
asked before. Static file: nginx serving the recorded answers (warmdock's, where it is measured) to the same client. CPU
is the server's per round, git's with its child processes. Peak memory: git's is sampled (PSS of nginx, fcgiwrap and git
together), warmdock's is VmHWM.
";

fn table(text: &mut String, outcomes: &[Outcome]) {
    text.push_str(
        "| case | clients | git with bitmaps s | warmdock cold s | warmdock warm s | static file s | warm is faster than git | cold is faster than git | MB/s git / warm | CPU s git / cold / warm | peak MB git / cold / warm |\n\
         | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n",
    );
    for outcome in outcomes {
        let Outcome {
            git,
            cold,
            warm,
            file,
            case,
        } = outcome;
        let sides = [git, cold, warm];
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {} | {} | {} | {} / {} | {} | {} |",
            case.title(),
            case.clients,
            wall(git),
            wall(cold),
            wall(warm),
            wall(file),
            times(git, warm),
            times(git, cold),
            rate(git, case.clients),
            rate(warm, case.clients),
            joined(sides, |figures| figures.server_cpu.map(seconds)),
            joined(sides, |figures| figures.peak_memory.map(megabytes)),
        );
    }
}

/// Sizes of the answers: a surplus of objects or a worse packing would show here.
fn answers(text: &mut String, outcomes: &[Outcome]) {
    text.push_str(
        "\n| case | clients | objects git / cold / warm | pack MB git / cold / warm | refs git / warm | ref list ms git / warm | of the peak, mapped files MB cold / warm | client CPU s git / warm / static | rounds git / cold / warm / static |\n\
         | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n",
    );
    for outcome in outcomes {
        let (git, cold, warm, file) = (&outcome.git, &outcome.cold, &outcome.warm, &outcome.file);
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {} | {} | {} | {} |",
            outcome.case.title(),
            outcome.case.clients,
            joined([git, cold, warm], |figures| Some(
                figures.received.pack?.objects.to_string()
            )),
            joined([git, cold, warm], |figures| Some(megabytes(
                figures.received.pack?.bytes
            ))),
            joined([git, warm], |figures| Some(
                figures.received.refs.to_string()
            )),
            joined([git, warm], |figures| Some(format!(
                "{:.1}",
                figures.received.list_time.as_secs_f64() * 1e3
            ))),
            joined([cold, warm], |figures| figures.mapped_files.map(megabytes)),
            joined([git, warm, file], |figures| Some(seconds(
                figures.client_cpu
            ))),
            joined([git, cold, warm, file], |figures| Some(
                figures.rounds.to_string()
            )),
        );
    }
}

fn failures(text: &mut String, outcomes: &[Outcome]) {
    for outcome in outcomes {
        let sides = [
            ("git", &outcome.git),
            ("warmdock cold", &outcome.cold),
            ("warmdock warm", &outcome.warm),
            ("static file", &outcome.file),
        ];
        for (side, measured) in sides {
            let title = outcome.case.full_title();
            match measured {
                Some(Err(error)) => {
                    let _ = writeln!(text, "\n{title}, {side}: could not be measured: {error:#}");
                }
                Some(Ok(figures)) if figures.refusals > 0 => {
                    let _ = writeln!(
                        text,
                        "\n{title}, {side}: refused with 503 and asked again {} times in {} rounds",
                        figures.refusals, figures.rounds
                    );
                }
                _ => {}
            }
        }
    }
}

pub fn figures(measured: &Measured) -> Option<&Figures> {
    measured.as_ref()?.as_ref().ok()
}

/// How many times less wall time `other` takes than `base`.
pub fn speedup(base: &Measured, other: &Measured) -> Option<f64> {
    Some(figures(base)?.wall.as_secs_f64() / figures(other)?.wall.as_secs_f64())
}

fn times(base: &Measured, other: &Measured) -> String {
    speedup(base, other).map_or_else(nothing, |times| format!("{times:.1} ×"))
}

fn nothing() -> String {
    "–".to_owned()
}

fn wall(measured: &Measured) -> String {
    match measured {
        None => nothing(),
        Some(Err(_)) => "failed".to_owned(),
        Some(Ok(figures)) => seconds(figures.wall),
    }
}

/// Megabytes (10^6) of answers per second, of all clients together.
fn rate(measured: &Measured, clients: usize) -> String {
    figures(measured).map_or_else(nothing, |figures| {
        let received = figures.received;
        let bytes = received.list_bytes + received.pack.map_or(0, |pack| pack.bytes);
        let rate = bytes as f64 * clients as f64 / 1e6 / figures.wall.as_secs_f64();
        format!("{rate:.0}")
    })
}

fn joined<const N: usize>(
    sides: [&Measured; N],
    value: impl Fn(&Figures) -> Option<String>,
) -> String {
    sides
        .map(|side| figures(side).and_then(&value).unwrap_or_else(nothing))
        .join(" / ")
}

/// Three significant digits, and never less than a tenth of a millisecond.
pub fn seconds(duration: Duration) -> String {
    let seconds = duration.as_secs_f64();
    match seconds {
        ..0.1 => format!("{seconds:.4}"),
        ..1.0 => format!("{seconds:.3}"),
        ..10.0 => format!("{seconds:.2}"),
        _ => format!("{seconds:.1}"),
    }
}

fn megabytes(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / 1e6)
}
