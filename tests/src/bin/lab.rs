//! The lab as a program: builds it, starts an agent on each node, reaches every Service of a directory from everywhere,
//! prints who answered, and cleans up. Exit status 0 means that everything was reached.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, IsTerminal as _, Write as _},
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use clap::{Args, Parser, Subcommand};
use comfy_table::{Table, presets::UTF8_BORDERS_ONLY};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use tests::{
    lab::{
        Between, Lab, LabOptions, Node, UplinkMode,
        address::Family,
        agent::{AgentOptions, clean_up, sluice_program, use_program},
        manifest::{self, Published},
        survey::{self, Finding},
    },
    netns,
    traffic::{Protocol, place::Place, resident},
};

/// In the order of the table.
const ORIGINS: [&str; 3] = ["pod", "node", "outside"];

/// Two nodes, their pods and a client outside, as network namespaces.
#[derive(Debug, Parser)]
#[command(args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    inside: Option<Inside>,
    #[command(flatten)]
    run: Run,
}

#[derive(Debug, Args)]
struct Run {
    /// The agent's binary; without it, the one beside this program.
    #[arg(long, env = "SLUICE_BIN")]
    sluice: Option<PathBuf>,
    /// Directory of Services, `EndpointSlices` and Nodes.
    #[arg(long, default_value = "examples")]
    examples: PathBuf,
    /// Keep a shell in the lab before it goes away.
    #[arg(long)]
    shell: bool,
    /// Pods reach those of the other node over VXLAN.
    #[arg(long)]
    overlay: bool,
    /// Print findings as JSON, one per line.
    #[arg(long)]
    json: bool,
    /// How node-a's uplink is translated.
    #[arg(long, default_value = "xdp", value_parser = uplink_mode)]
    uplink_a: UplinkMode,
    /// How node-b's uplink is translated.
    #[arg(long, default_value = "tc", value_parser = uplink_mode)]
    uplink_b: UplinkMode,
}

#[derive(Debug, Subcommand)]
enum Inside {
    /// Serves and sends on command (stdin and stdout are for a program).
    #[command(hide = true)]
    Resident,
    /// Runs a command in a namespace and a cgroup of the lab.
    #[command(hide = true)]
    Enter {
        netns: PathBuf,
        cgroup: PathBuf,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        command: Vec<String>,
    },
}

fn uplink_mode(name: &str) -> Result<UplinkMode, String> {
    let mode = [UplinkMode::Xdp, UplinkMode::Tc].into_iter().find(|mode| mode.name() == name);
    mode.ok_or_else(|| "xdp or tc".to_owned())
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.inside {
        Some(Inside::Resident) => resident::run().map(|()| ExitCode::SUCCESS),
        Some(Inside::Enter { netns, cgroup, command }) => enter(&netns, &cgroup, &command),
        None => run(&cli.run),
    };
    result.unwrap_or_else(|error| {
        eprintln!("lab: {error:#}");
        ExitCode::FAILURE
    })
}

fn enter(netns: &Path, cgroup: &Path, command: &[String]) -> Result<ExitCode> {
    let (program, arguments) = command.split_first().context("no command")?;
    let mut command = Command::new(program);
    tests::lab::cgroup::enter_on_exec(&mut command, cgroup)?;
    netns::enter_on_exec(&mut command, fs::File::open(netns)?.into());
    Err(command.args(arguments).exec()).with_context(|| format!("cannot run {program}"))
}

/// Set by the signals that end the program, so that the lab is taken down and not just left.
#[derive(Clone, Debug)]
struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    fn listen() -> Result<Self> {
        let flag = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            signal_hook::flag::register(signal, Arc::clone(&flag))?;
        }
        Ok(Self(flag))
    }

    fn has_come(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    fn check(&self) -> Result<()> {
        if self.has_come() {
            bail!("interrupted");
        }
        Ok(())
    }
}

fn run(options: &Run) -> Result<ExitCode> {
    let interrupt = Interrupt::listen()?;
    if let Some(program) = &options.sluice {
        use_program(program)?;
    }
    let ports = manifest::read(&options.examples)?;
    if ports.is_empty() {
        bail!("{} holds no Services", options.examples.display());
    }
    let source = fs::canonicalize(&options.examples)?;
    eprintln!("building two nodes, six pods and a client");
    let between = if options.overlay { Between::Overlay } else { Between::Wire };
    let lab = Lab::new(LabOptions { uplinks: [options.uplink_a, options.uplink_b], between })?;
    eprintln!("starting an agent on each node");
    lab.start_agents(&source, &AgentOptions::default())?;
    let is_complete = survey_all(&lab, &ports, options.json, &interrupt)?;
    if !options.json {
        show_flow(&lab);
    }
    if options.shell {
        shell(&lab, &interrupt)?;
    }
    take_down(&lab)?;
    Ok(if is_complete { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn survey_all(lab: &Lab, ports: &[Published], json: bool, interrupt: &Interrupt) -> Result<bool> {
    let mut findings = Vec::new();
    for port in ports {
        for way in survey::ways(lab, port) {
            interrupt.check()?;
            progress(&format!("{} → {}", way.client.name(), way.target));
            findings.push(survey::try_way(&way, port)?);
        }
    }
    progress("");
    let mut stdout = io::stdout().lock();
    if json {
        for finding in &findings {
            writeln!(stdout, "{}", serde_json::to_string(finding)?)?;
        }
    } else {
        writeln!(stdout, "{}", table(&findings))?;
    }
    let incomplete = findings.iter().filter(|finding| !finding.is_complete()).count();
    eprintln!("{} of {} ways reach every backend", findings.len() - incomplete, findings.len());
    Ok(incomplete == 0)
}

/// What is being tried, on one line that the next one overwrites.
fn progress(what: &str) {
    if io::stderr().is_terminal() {
        eprint!("\r\x1b[K{what}");
    }
}

/// A row per client and kind of address, with the four kinds of traffic beside each other.
fn table(findings: &[Finding]) -> Table {
    let mut rows: BTreeMap<_, BTreeMap<_, _>> = BTreeMap::new();
    for finding in findings {
        let row =
            (&finding.service, ORIGINS.iter().position(|from| *from == finding.from), &finding.client, &finding.to);
        rows.entry(row).or_default().insert((finding.protocol, finding.family), cell(finding));
    }
    let mut table = Table::new();
    let kinds = Protocol::ALL.map(|protocol| Family::ALL.map(|family| (protocol, family.name())));
    let titles = kinds.iter().flatten().map(|(protocol, family)| format!("{protocol} {family}"));
    table
        .load_style(UTF8_BORDERS_ONLY)
        .set_header(["Service", "client", "to"].map(String::from).into_iter().chain(titles));
    for ((service, _, client, to), mut cells) in rows {
        let cells = kinds.iter().flatten().map(|kind| cells.remove(kind).unwrap_or_default());
        table.add_row([service, client, to].map(String::clone).into_iter().chain(cells));
    }
    table
}

/// How often which pod answered, and what went wrong.
fn cell(finding: &Finding) -> String {
    let answers = finding.answers.iter().map(|(pod, count)| format!("{pod} {count}"));
    let failures = finding.failures.iter().map(|(failure, count)| format!("{failure} ({count})"));
    // After a failure the rest was not tried.
    let missing = finding.missing.iter().filter(|_| finding.failures.is_empty()).map(|pod| format!("{pod} never"));
    answers.chain(missing).chain(failures).collect::<Vec<_>>().join(", ")
}

/// One flow as other tools see it.
fn show_flow(lab: &Lab) {
    let map = lab.nodes[0].pins().join("maps/FLOWS_V4");
    let dump = Command::new("bpftool").args(["map", "dump", "pinned"]).arg(&map).stderr(Stdio::null()).output();
    let Ok(dump) = dump else {
        eprintln!("bpftool is not installed: no look into {}", map.display());
        return;
    };
    let flows: Vec<serde_json::Value> = serde_json::from_slice(&dump.stdout).unwrap_or_default();
    match flows.first() {
        Some(flow) => {
            eprintln!("one of {} flows in {}:", flows.len(), map.display());
            show_fields("key", &flow["key"]);
            show_fields("value", &flow["value"]);
        }
        None => eprintln!("{} shows no flow", map.display()),
    }
}

/// A field a line, by its path; in the dump itself every octet has one.
fn show_fields(path: &str, value: &serde_json::Value) {
    match value.as_object() {
        Some(fields) if !fields.contains_key("octets") => {
            for (name, field) in fields {
                show_fields(&format!("{path}.{name}"), field);
            }
        }
        Some(fields) => eprintln!("  {path:<26} {}", fields["octets"]),
        None => eprintln!("  {path:<26} {value}"),
    }
}

/// A shell on the machine, with a command per place that runs others inside.
fn shell(lab: &Lab, interrupt: &Interrupt) -> Result<()> {
    let directory = tempfile::tempdir()?;
    for place in lab.places() {
        write_command(directory.path(), place)?;
    }
    for node in &lab.nodes {
        write_verbs(directory.path(), node)?;
    }
    let names: Vec<_> = lab.places().map(Place::name).collect();
    eprintln!("\nA command per place runs others inside: {}.", names.join(" "));
    eprintln!("The command line of each node's agent: sluice-a status, sluice-b flow list, …");
    eprintln!("Services are those of examples/. Try:");
    eprintln!("  client-a bash -c 'exec 3<>/dev/tcp/10.96.0.10/7; echo hi >&3; head -n 1 <&3'");
    eprintln!("  sluice-a service get echo");
    eprintln!("Leave with exit.");
    let path = std::env::var_os("PATH").unwrap_or_default();
    let paths = std::iter::once(directory.path().to_owned()).chain(std::env::split_paths(&path));
    let program = std::env::var_os("SHELL").unwrap_or_else(|| "/bin/sh".into());
    let mut child =
        Command::new(program).env("PATH", std::env::join_paths(paths)?).spawn().context("cannot run a shell")?;
    loop {
        if child.try_wait()?.is_some() {
            return Ok(());
        }
        // An interactive shell keeps the terminal's interrupts to itself; what arrives here is meant for the lab.
        if interrupt.has_come() {
            child.kill()?;
            child.wait()?;
            return Ok(());
        }
        thread::sleep(Duration::from_millis(50));
    }
}

fn write_command(directory: &Path, place: &Place) -> Result<()> {
    let own = std::env::current_exe()?;
    let (own, netns, cgroup) = (own.display(), place.namespace().path(), place.cgroup().display());
    let script = format!("#!/bin/sh\nexec '{own}' enter '{}' '{cgroup}' \"$@\"\n", netns.display());
    let path = directory.join(place.name());
    fs::write(&path, script)?;
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(0o755))?)
}

/// A command that asks what a node's agent has pinned, in the node's place.
fn write_verbs(directory: &Path, node: &Node) -> Result<()> {
    let place = directory.join(node.host.name());
    let script = format!(
        "#!/bin/sh\nexec '{}' '{}' \"$@\" --pin-path '{}'\n",
        place.display(),
        sluice_program()?.display(),
        node.pins().display()
    );
    let path = directory.join(node.plan.name.replace("node", "sluice"));
    fs::write(&path, script)?;
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(0o755))?)
}

/// What an agent made, an agent removes; the rest goes away with the lab.
fn take_down(lab: &Lab) -> Result<()> {
    for node in &lab.nodes {
        node.kill_agent();
        let output = clean_up(node)?;
        if !output.status.success() {
            bail!("sluice cleanup on {}: {}", node.plan.name, String::from_utf8_lossy(&output.stderr).trim());
        }
    }
    Ok(())
}
