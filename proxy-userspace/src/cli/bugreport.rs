//! `sluice bugreport`: one archive with what somebody needs who was not there. It holds what the kernel holds: addresses, ports and names
//! of Services, and no object of the cluster, no log and no credential. Command lines are redacted.

use std::{fs::File, io::Write, path::PathBuf, process::Command};

use anyhow::{Context as _, Result};
use clap::Args;
use flate2::{Compression, write::GzEncoder};
use serde::Serialize;

use super::{Failure, counters::counted, output::print};
use crate::{
    dataplane::{Options, examine, netlink},
    inspect::{FlowFilter, Inspector},
};

/// Where to.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  sluice bugreport --to /tmp/sluice.tar.gz")]
pub(super) struct Arguments {
    /// Directory the agent pinned its maps and links under.
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/bpf/sluice")]
    pin_path: PathBuf,
    /// The archive. A file that is there is not written over.
    #[arg(long, value_name = "FILE", default_value = "sluice-bugreport.tar.gz")]
    to: PathBuf,
}

pub(super) fn execute(arguments: &Arguments) -> Result<(), Failure> {
    let files = collect(arguments);
    archive(&arguments.to, &files).map_err(|error| Failure::new(error, 1))?;
    let names: Vec<String> =
        files.iter().map(|(name, content)| format!("  {name} ({} bytes)", content.len())).collect();
    print(&format!(
        "{} holds:\n{}\nLook at it before you give it away: it names Services, addresses and devices.",
        arguments.to.display(),
        names.join("\n")
    ))
}

/// What is not to be had leaves its reason in its place.
fn collect(arguments: &Arguments) -> Vec<(&'static str, Vec<u8>)> {
    let mut files = vec![
        ("version.txt", format!("sluice {}\n", env!("CARGO_PKG_VERSION")).into_bytes()),
        ("check.json", check(arguments)),
        ("kernel.txt", command("uname", &["-a"])),
        ("links.txt", command("ip", &["-details", "link"])),
        ("addresses.txt", command("ip", &["address"])),
        ("routes.txt", command("ip", &["route", "show", "table", "all"])),
        ("routes6.txt", command("ip", &["-6", "route", "show", "table", "all"])),
    ];
    match Inspector::open(&arguments.pin_path) {
        Ok(inspector) => files.extend([
            ("status.json", json(inspector.status())),
            ("services.json", json(inspector.services())),
            ("backends.json", json(inspector.backends())),
            ("affinities.json", json(inspector.affinities())),
            ("counters.json", json(Ok::<_, String>(counted(&inspector, false)))),
            ("flows.json", json(inspector.flows(&FlowFilter { halves: true, ..FlowFilter::default() }))),
            ("agent.txt", command_line(&inspector)),
        ]),
        Err(error) => files.push(("maps.txt", error.to_string().into_bytes())),
    }
    files
}

fn json<T: Serialize, E: std::fmt::Display>(found: Result<T, E>) -> Vec<u8> {
    match found {
        Ok(found) => serde_json::to_vec_pretty(&found).unwrap_or_else(|error| error.to_string().into_bytes()),
        Err(error) => error.to_string().into_bytes(),
    }
}

fn check(arguments: &Arguments) -> Vec<u8> {
    let network = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| error.to_string())
        .and_then(|runtime| runtime.block_on(netlink::snapshot()).map_err(|error| error.to_string()));
    json(Ok::<_, String>(examine(&Options::new(&arguments.pin_path), network.as_ref().map_err(Clone::clone))))
}

/// What a tool of the node says, if it is there.
fn command(program: &str, arguments: &[&str]) -> Vec<u8> {
    match Command::new(program).args(arguments).output() {
        Ok(output) => [output.stdout, output.stderr].concat(),
        Err(error) => format!("{program}: {error}\n").into_bytes(),
    }
}

/// How the agent was started.
fn command_line(inspector: &Inspector) -> Vec<u8> {
    let Ok(status) = inspector.status() else { return Vec::new() };
    let line = std::fs::read(format!("/proc/{}/cmdline", status.agent.pid)).unwrap_or_default();
    let words = line.split(|octet| *octet == 0).map(String::from_utf8_lossy).map(|word| redact(&word));
    words.collect::<Vec<_>>().join(" ").into_bytes()
}

/// A word without what may be a credential: user and password in an URL, and whatever follows the name of a secret.
fn redact(word: &str) -> String {
    const SECRETS: [&str; 4] = ["token", "password", "secret", "key"];
    if let Some((name, _)) = word.split_once('=')
        && SECRETS.iter().any(|secret| name.to_ascii_lowercase().contains(secret))
    {
        return format!("{name}=REDACTED");
    }
    match (word.find("://"), word.rfind('@')) {
        (Some(scheme), Some(at)) if scheme < at => format!("{}REDACTED{}", &word[..scheme + 3], &word[at..]),
        _ => word.to_owned(),
    }
}

fn archive(path: &PathBuf, files: &[(&str, Vec<u8>)]) -> Result<()> {
    let file =
        File::create_new(path).with_context(|| format!("cannot make {}: choose another by --to", path.display()))?;
    let mut archive = tar::Builder::new(GzEncoder::new(file, Compression::default()));
    for (name, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o600);
        archive.append_data(&mut header, format!("sluice-bugreport/{name}"), content.as_slice())?;
    }
    archive.into_inner()?.finish()?.flush()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::redact;

    #[test]
    fn what_may_be_a_credential_is_left_out() {
        let cases = [
            ("--master=https://me:secret@api:6443", "--master=https://REDACTED@api:6443"),
            ("--bearer-token=abc", "--bearer-token=REDACTED"),
            ("--kubeconfig=/etc/kubeconfig", "--kubeconfig=/etc/kubeconfig"),
            ("https://a:b@one,https://c:d@two", "https://REDACTED@two"),
            ("--uplinks=eth0", "--uplinks=eth0"),
        ];
        for (word, expected) in cases {
            assert_eq!(redact(word), expected);
        }
    }
}
