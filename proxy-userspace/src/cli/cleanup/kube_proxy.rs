//! `sluice cleanup --kube-proxy`.

use anyhow::anyhow;

use super::super::{
    EX_CONFIG, Failure,
    output::{Target, columns},
};
use crate::kube_proxy::{self, Found, Process, Report, Trace};

/// Why nothing was done.
const RUNS: &str = "and would write everything again: keep its pod off this node (its DaemonSet's nodeSelector), or end it, and try again";

/// Takes out what kube-proxy has left on this node, or says what that would be.
pub(super) fn execute(target: &Target, is_dry_run: bool, is_forced: bool) -> Result<(), Failure> {
    let found = kube_proxy::find();
    let report = if is_dry_run {
        planned(&found)
    } else {
        admit(&found, is_forced)?;
        with_notes(found.remove())
    };
    target.show(&report, |report| describe(report, is_dry_run))?;
    match report.problems.as_slice() {
        [] => Ok(()),
        problems => Err(Failure::new(anyhow!("{}", problems.join("\nsluice: ")), 1)),
    }
}

fn planned(found: &Found) -> Report {
    let mut report = with_notes(found.plan());
    if let Process::Runs(number) = kube_proxy::process() {
        report
            .notes
            .push(format!("kube-proxy runs (process {number}): without --dry-run this is refused until it has ended"));
    }
    match kube_proxy::connections(found) {
        Ok(0) => {}
        Ok(count) => report.notes.push(format!(
            "open connections with a translated destination: {count}; without --dry-run this is refused until they have ended, but for --force"
        )),
        Err(error) => report.notes.push(format!("connections cannot be counted: {error}")),
    }
    report
}

/// Whether it may be done now.
fn admit(found: &Found, is_forced: bool) -> Result<(), Failure> {
    if let Process::Runs(number) = kube_proxy::process() {
        return Err(Failure::new(anyhow!("kube-proxy runs on this node (process {number}) {RUNS}"), EX_CONFIG));
    }
    if found.is_empty() || is_forced {
        return Ok(());
    }
    let failed = |error| Failure::new(anyhow!("connections cannot be counted ({error}); --force does without"), 1);
    match kube_proxy::connections(found).map_err(failed)? {
        0 => Ok(()),
        count => Err(Failure::new(
            anyhow!(
                "open connections with a translated destination: {count}; they may end with the rules: try again when they have \
                 (`conntrack -L --dst-nat` lists them), or use --force"
            ),
            1,
        )),
    }
}

fn with_notes(mut report: Report) -> Report {
    if kube_proxy::process() == Process::Unseen {
        report.notes.push(
            "processes of the node cannot be seen from here: see to it that no kube-proxy runs, which would write everything again".into(),
        );
    }
    report
}

fn describe(report: &Report, is_dry_run: bool) -> String {
    let verb = if is_dry_run { "would be removed" } else { "removed" };
    let removed = report.removed.iter().flat_map(|trace| rows(trace, verb));
    let kept = report.kept.iter().map(|kept| {
        let what = format!("{} (because of `{}`)", kept.what, kept.because);
        ["kept".to_owned(), String::new(), String::new(), String::new(), what]
    });
    let nothing = if report.problems.is_empty() { "There is nothing of kube-proxy's here.\n" } else { "" };
    let mut text = columns(&["", "WHERE", "FAMILY", "TABLE", "WHAT"], removed.chain(kept), nothing);
    for note in &report.notes {
        text.push_str("note: ");
        text.push_str(note);
        text.push('\n');
    }
    text
}

/// A row for each rule, one for everything else.
fn rows(trace: &Trace, verb: &str) -> Vec<[String; 5]> {
    let family = trace.family.map(|family| family.name().to_owned()).unwrap_or_default();
    let row = |what: String| {
        let table = trace.table.clone().unwrap_or_default();
        [verb.to_owned(), trace.mechanism.to_owned(), family.clone(), table, what]
    };
    match trace.kind {
        "rules" => trace.items.iter().map(|rule| row(rule.clone())).collect(),
        _ => vec![row(trace.to_string())],
    }
}
