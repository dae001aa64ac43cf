//! `sluice check`: whether this node can run Sluice.

use std::path::PathBuf;

use clap::Args;

use super::{
    EX_CONFIG, Failure,
    output::{Target, columns},
};
use crate::{
    dataplane::{DevicePattern, Finding, Options, Verdict, examine, netlink},
    inspect::own_agent_at_work,
    kube_proxy,
};

/// What to look at.
#[derive(Debug, Args)]
#[command(
    after_help = "Exit status 78 means that the node must change before an agent can start.\n\nExamples:\n  sluice check\n  sluice check --uplinks eth0 -o json"
)]
pub(super) struct Arguments {
    /// Devices that lead out of the node, as for `sluice run`.
    #[arg(long, value_name = "PATTERN,…", value_delimiter = ',')]
    uplinks: Vec<DevicePattern>,
    /// Devices that lead to pods, as for `sluice run`.
    #[arg(long, value_name = "PATTERN,…", value_delimiter = ',')]
    pod_devices: Vec<DevicePattern>,
    /// Directory of the cgroup whose sockets are to be balanced, as for `sluice run`.
    #[arg(long, value_name = "DIR")]
    cgroup: Option<PathBuf>,
    /// Have the kernel verify every program, even where an agent of this very executable has those that its devices need at work.
    #[arg(long)]
    load: bool,
    #[command(flatten)]
    target: Target,
}

pub(super) fn execute(arguments: &Arguments) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Failure::new(error, 1))?;
    let network = runtime.block_on(netlink::snapshot()).map_err(|error| error.to_string());
    let mut options = Options::new(&arguments.target.pin_path);
    options.uplinks.clone_from(&arguments.uplinks);
    options.pod_devices.clone_from(&arguments.pod_devices);
    options.cgroup.clone_from(&arguments.cgroup);
    // What is asked of other devices may need programs that the agent has not loaded.
    let is_asked = arguments.load || !options.uplinks.is_empty() || !options.pod_devices.is_empty();
    let own_agent = if is_asked { None } else { own_agent_at_work(&options.pin_path) };
    let mut findings = examine(&options, network.as_ref().map_err(Clone::clone), own_agent);
    findings.push(kube_proxy::finding());
    arguments.target.show(&findings, |findings| describe(findings))?;
    match findings.iter().filter(|finding| finding.verdict == Verdict::Missing).count() {
        0 => Ok(()),
        1 => Err(Failure::new(anyhow::anyhow!("1 thing is missing: an agent would not start"), EX_CONFIG)),
        count => Err(Failure::new(anyhow::anyhow!("{count} things are missing: an agent would not start"), EX_CONFIG)),
    }
}

fn describe(findings: &[Finding]) -> String {
    let row = |finding: &Finding| {
        let advice = if finding.advice.is_empty() { String::new() } else { format!(" ({})", finding.advice) };
        [finding.subject.to_owned(), finding.verdict.name().to_owned(), format!("{}{advice}", finding.found)]
    };
    columns(&["WHAT", "IS", "FOUND"], findings.iter().map(row), "")
}

#[cfg(test)]
mod tests {
    use super::describe;
    use crate::dataplane::{Finding, Verdict};

    #[test]
    fn what_is_not_good_comes_with_advice() {
        let finding = |subject, verdict, found: &str, advice: &str| Finding {
            subject,
            verdict,
            found: found.into(),
            advice: advice.into(),
        };
        let findings = [
            finding("kernel 6.1 or later", Verdict::Good, "6.18.5", ""),
            finding("BPF file system", Verdict::Fallback, "not mounted", "the agent mounts it at /sys/fs/bpf"),
            finding("capability BPF", Verdict::Missing, "no", "run as root"),
        ];
        insta::assert_snapshot!("check", describe(&findings));
        insta::assert_snapshot!("check_json", serde_json::to_string_pretty(&findings).unwrap());
    }
}
