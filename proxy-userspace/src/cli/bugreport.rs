//! `sluice bugreport`: one archive with what somebody needs who was not there. It holds what the kernel holds: addresses, ports and names
//! of Services, and no object of the cluster, no log and no credential. Command lines are redacted. Nothing in it needs another program of
//! the node's, because the image has none.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, IsTerminal as _, Write},
    os::unix::fs::OpenOptionsExt as _,
    panic::resume_unwind,
    path::{Path, PathBuf},
    thread::{self, ScopedJoinHandle},
};

use anyhow::{Result, anyhow, ensure};
use clap::Args;
use flate2::{Compression, write::GzEncoder};
use serde::Serialize;
use tokio::runtime;

use super::{Failure, counters::counted, output::print};
use crate::{
    dataplane::{Options, examine, netlink},
    inspect::{FlowFilter, Inspector, own_agent_at_work},
};

/// Where to.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  sluice bugreport --to /tmp/sluice.tar.gz
  kubectl -n kube-system exec POD -- /sluice bugreport --to - > sluice.tar.gz")]
pub(super) struct Arguments {
    /// Directory the agent pinned its maps and links under.
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/bpf/sluice")]
    pin_path: PathBuf,
    /// The archive. A file that is there is not written over; `-` is standard output.
    #[arg(long, value_name = "FILE", default_value = "sluice-bugreport.tar.gz")]
    to: PathBuf,
}

pub(super) fn execute(arguments: &Arguments) -> Result<(), Failure> {
    let failure = |error| Failure::new(error, 1);
    if arguments.to.as_os_str() == "-" {
        let contents = pipe(arguments).map_err(failure)?;
        eprintln!("The archive holds:\n{contents}");
        return Ok(());
    }
    let files = collect(arguments);
    create(&arguments.to).and_then(|file| archive(file, &files)).map_err(failure)?;
    print(&format!("{} holds:\n{}", arguments.to.display(), contents(&files)))
}

/// The archive to standard output; gives what is in it.
fn pipe(arguments: &Arguments) -> Result<String> {
    let output = io::stdout().lock();
    ensure!(!output.is_terminal(), "the archive is no text for a terminal: send it into a file by `>`");
    let files = collect(arguments);
    archive(output, &files)?;
    Ok(contents(&files))
}

fn contents(files: &[Part]) -> String {
    let line = |(name, content): &Part| format!("  {name} ({} bytes)", content.len());
    let lines: Vec<String> = files.iter().map(line).collect();
    lines.join("\n") + "\nLook at it before you give it away: it names Services, addresses and devices."
}

/// Who may read the node's other files need not read this one.
fn create(path: &Path) -> Result<File> {
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(|error| {
        anyhow!("cannot make {}: {error}; choose another by --to, or standard output by --to=-", path.display())
    })
}

/// A file of the archive: name and content.
type Part = (&'static str, Vec<u8>);

/// What is not to be had leaves its reason in its place. Beside each other: what is asked of the node, and the longest lists.
fn collect(arguments: &Arguments) -> Vec<Part> {
    let inspector = Inspector::open(&arguments.pin_path);
    thread::scope(|scope| {
        let node = scope.spawn(|| of_node(arguments));
        let maps = match &inspector {
            Ok(inspector) => {
                let services = scope.spawn(|| compact(inspector.services()));
                let backends = scope.spawn(|| compact(inspector.backends()));
                let mut files = of_maps(inspector);
                files.extend([("services.json", joined(services)), ("backends.json", joined(backends))]);
                files
            }
            Err(error) => vec![("maps.txt", error.to_string().into_bytes())],
        };
        let mut files = joined(node);
        files.extend(maps);
        files
    })
}

fn joined<T>(thread: ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| resume_unwind(panic))
}

fn of_node(arguments: &Arguments) -> Vec<Part> {
    vec![
        ("version.txt", format!("sluice {}\n", env!("CARGO_PKG_VERSION")).into_bytes()),
        ("check.json", check(arguments)),
        ("kernel.txt", fs::read("/proc/version").unwrap_or_else(|error| error.to_string().into_bytes())),
        ("network.txt", on_runtime(netlink::dump()).unwrap_or_else(|error| error).into_bytes()),
    ]
}

/// All but Services and backends.
fn of_maps(inspector: &Inspector) -> Vec<Part> {
    vec![
        ("status.json", json(inspector.status())),
        ("affinities.json", compact(inspector.affinities())),
        ("counters.json", json(Ok::<_, String>(counted(inspector, false)))),
        ("flows.json", compact(inspector.flows(&FlowFilter { halves: true, ..FlowFilter::default() }))),
        ("agent.txt", command_line(inspector)),
    ]
}

fn json<T: Serialize, E: std::fmt::Display>(found: Result<T, E>) -> Vec<u8> {
    written(found, serde_json::to_vec_pretty)
}

/// Of thousands: half of the bytes are blanks otherwise, and who reads them has a tool for it.
fn compact<T: Serialize, E: std::fmt::Display>(found: Result<T, E>) -> Vec<u8> {
    written(found, serde_json::to_vec)
}

fn written<T, E: std::fmt::Display>(
    found: Result<T, E>,
    write: impl FnOnce(&T) -> serde_json::Result<Vec<u8>>,
) -> Vec<u8> {
    match found {
        Ok(found) => write(&found).unwrap_or_else(|error| error.to_string().into_bytes()),
        Err(error) => error.to_string().into_bytes(),
    }
}

fn check(arguments: &Arguments) -> Vec<u8> {
    let network = on_runtime(netlink::snapshot());
    let options = Options::new(&arguments.pin_path);
    let findings = examine(&options, network.as_ref().map_err(Clone::clone), own_agent_at_work(&arguments.pin_path));
    json(Ok::<_, String>(findings))
}

/// What the kernel answers, or why it does not.
fn on_runtime<T>(asking: impl Future<Output = Result<T, netlink::NetlinkError>>) -> Result<T, String> {
    let runtime = runtime::Builder::new_current_thread().enable_all().build().map_err(|error| error.to_string())?;
    runtime.block_on(asking).map_err(|error| error.to_string())
}

/// How the agent was started.
fn command_line(inspector: &Inspector) -> Vec<u8> {
    let Ok(agent) = inspector.agent() else { return Vec::new() };
    let line = fs::read(format!("/proc/{}/cmdline", agent.pid)).unwrap_or_default();
    let words: Vec<_> = line.split(|octet| *octet == 0).map(String::from_utf8_lossy).collect();
    redact(&words).into_bytes()
}

/// Words without what may be a credential: user and password in an URL, and whatever follows the name of a secret, in its word or as the next.
fn redact(words: &[impl AsRef<str>]) -> String {
    let is_secret = |name: &str| {
        let name = name.to_ascii_lowercase();
        ["token", "password", "secret", "key"].iter().any(|secret| name.contains(secret))
    };
    let mut redacted = Vec::new();
    let mut follows_secret = false;
    for word in words.iter().map(AsRef::as_ref) {
        redacted.push(match word.split_once('=') {
            _ if follows_secret => "REDACTED".to_owned(),
            Some((name, _)) if is_secret(name) => format!("{name}=REDACTED"),
            _ => without_user(word),
        });
        follows_secret = !follows_secret && word.starts_with("--") && !word.contains('=') && is_secret(word);
    }
    redacted.join(" ")
}

/// An URL, or several, without who asks.
fn without_user(word: &str) -> String {
    match (word.find("://"), word.rfind('@')) {
        (Some(scheme), Some(at)) if scheme < at => format!("{}REDACTED{}", &word[..scheme + 3], &word[at..]),
        _ => word.to_owned(),
    }
}

fn archive(to: impl Write, files: &[Part]) -> Result<()> {
    let mut archive = tar::Builder::new(GzEncoder::new(to, Compression::fast()));
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
            ("--bearer-token abc --uplinks eth0", "--bearer-token REDACTED --uplinks eth0"),
            ("--token --key run", "--token REDACTED run"),
            ("--kubeconfig=/etc/kubeconfig", "--kubeconfig=/etc/kubeconfig"),
            ("https://a:b@one,https://c:d@two", "https://REDACTED@two"),
            ("--uplinks=eth0", "--uplinks=eth0"),
        ];
        for (words, expected) in cases {
            assert_eq!(redact(&words.split(' ').collect::<Vec<_>>()), expected);
        }
    }
}
