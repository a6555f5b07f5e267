//! The figures that the project promises, and whether this run shows them.

use std::fmt::Write;

use crate::cases::Outcome;
use crate::options::CaseKind;
use crate::report::{figures, speedup};

pub fn verdicts(text: &mut String, outcomes: &[Outcome]) {
    text.push_str("\n### Targets\n\n");
    let find = |kind, clients| {
        outcomes
            .iter()
            .find(|outcome| outcome.case.kind == kind && outcome.case.clients == clients)
    };

    for (kind, remark) in [
        (CaseKind::Full, "the client computing checksums"),
        (CaseKind::FullUnchecked, "the client computing none"),
    ] {
        let case = find(kind, 8);
        verdict(
            text,
            &format!(
                "full clone with 8 clients, {remark}: at least 10 times the throughput of git with bitmaps"
            ),
            case.and_then(|case| speedup(&case.git, &case.warm)),
            |times| times >= 10.0,
            |times| format!("{times:.1} times"),
        );
        verdict(
            text,
            &format!("full clone with 8 clients, {remark}: within 2 times of the static file"),
            case.and_then(|case| speedup(&case.warm, &case.file)),
            |times| times <= 2.0,
            |times| format!("{times:.2} times its time"),
        );
    }
    for outcome in outcomes.iter().filter(|o| o.case.kind == CaseKind::Depth1) {
        verdict(
            text,
            &format!(
                "{}, repeated: at least 20 times git",
                outcome.case.full_title()
            ),
            speedup(&outcome.git, &outcome.warm),
            |times| times >= 20.0,
            |times| format!("{times:.1} times"),
        );
    }
    for outcome in outcomes {
        verdict(
            text,
            &format!(
                "{}: a cold answer no slower than git's",
                outcome.case.full_title()
            ),
            speedup(&outcome.cold, &outcome.git),
            |part| part <= 1.0,
            |part| format!("{part:.2} of git's time"),
        );
    }
    verdict(
        text,
        "ref list: at most a third of git's time",
        find(CaseKind::Refs, 1).and_then(|case| speedup(&case.warm, &case.git)),
        |part| part <= 1.0 / 3.0,
        |part| format!("{part:.3} of git's time"),
    );
    let peak = outcomes
        .iter()
        .filter(|outcome| outcome.case.clients >= 32)
        .flat_map(|outcome| [&outcome.cold, &outcome.warm])
        .filter_map(|measured| figures(measured)?.peak_memory)
        .max();
    verdict(
        text,
        "peak memory of the service below 200 MB with 32 clients",
        peak.map(|bytes| bytes as f64 / 1e6),
        |megabytes| megabytes < 200.0,
        |megabytes| format!("{megabytes:.0} MB"),
    );
}

fn verdict(
    text: &mut String,
    target: &str,
    value: Option<f64>,
    met: impl Fn(f64) -> bool,
    show: impl Fn(f64) -> String,
) {
    let _ = match value {
        None => writeln!(text, "- not measured: {target}"),
        Some(value) if met(value) => writeln!(text, "- **met**: {target} ({})", show(value)),
        Some(value) => writeln!(text, "- **missed**: {target} ({})", show(value)),
    };
}
