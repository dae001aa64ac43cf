//! The metrics, and what each outcome of a packet means, in the words of the code that counts it.

use std::{collections::BTreeMap, fmt::Write as _};

use proxy_common::outcome::{Hook, Outcome};

use super::{assert_is_current, cell};
use crate::packaging::{read, series};

const HEAD: &str = "# Metrics\n\n\
    <!-- Made from the code by `cargo xtask docs`. -->\n\n\
    They are served as `/metrics` at `--metrics-bind-address`. Where that is empty nothing is counted. Names that begin with `kubeproxy_` \
    are kube-proxy's and mean what they mean there. A Service port or a backend that nobody has used has no series yet; with \
    `--metrics-per-backend=false` backends never have. A histogram has series with the suffixes `_bucket`, `_sum` and `_count`.\n\n\
    | metric | kind | labels | what |\n|---|---|---|---|\n";
const OUTCOMES: &str = "\n## Outcomes\n\n\
    What the programs count is told by `reason`, or `event`, and by the `hook` where it happened. A packet of a known flow, and one \
    that is nobody's of ours, is not counted here.\n\n\
    | metric | label | meaning |\n|---|---|---|\n";
const HOOKS: &str = "\n## Hooks\n\n| `hook` | where |\n|---|---|\n";

/// What stands in the source above each variant of an enum: `/// …` and then `Name = number,`.
fn documented(source: &str, kind: &str) -> BTreeMap<String, String> {
    let body = source.split_once(&format!("pub enum {kind} {{\n")).unwrap().1.split_once("\n}\n").unwrap().0;
    let (mut meanings, mut words) = (BTreeMap::new(), Vec::new());
    for line in body.lines().map(str::trim) {
        if let Some(word) = line.strip_prefix("/// ") {
            words.push(word);
        } else if let Some((name, _)) = line.split_once(" = ") {
            meanings.insert(name.to_owned(), std::mem::take(&mut words).join(" "));
        }
    }
    meanings
}

fn table() -> String {
    let mut text = HEAD.to_owned();
    for (name, metric) in series::all() {
        let labels = metric.labels.iter().filter(|label| *label != "le").map(|label| format!("`{label}`"));
        let labels = labels.collect::<Vec<_>>().join(", ");
        let name = if metric.kind == "counter" { format!("{name}_total") } else { name };
        let _ = writeln!(text, "| `{name}` | {} | {labels} | {} |", metric.kind, cell(&metric.help));
    }
    text
}

#[test]
fn the_page_of_metrics_is_what_the_agent_serves() {
    let source = read("proxy-common/src/outcome.rs");
    let (outcomes, hooks) = (documented(&source, "Outcome"), documented(&source, "Hook"));
    let mut text = table() + OUTCOMES;
    for outcome in Outcome::ALL {
        let (metric, label, reason) = crate::metrics::named(outcome);
        let meaning = cell(&outcomes[&format!("{outcome:?}")]);
        let _ = writeln!(text, "| `{metric}_total` | `{label}=\"{reason}\"` | {meaning} |");
    }
    text += HOOKS;
    for hook in Hook::ALL {
        let _ = writeln!(
            text,
            "| `{}` | {} |",
            crate::inspect::meaning::hook_name(hook),
            cell(&hooks[&format!("{hook:?}")])
        );
    }
    assert_is_current("reference/metrics.md", &text);
}
