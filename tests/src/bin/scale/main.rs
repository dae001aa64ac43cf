//! Measures the agent in a cluster of many Services: how soon all of them are in the kernel, how soon a change is, and what
//! the agent keeps in memory; and, if asked, how long the same takes as rules of nftables and iptables. The API server is the fake one, on this machine; the kernel is real. Exit status 0 means
//! that every goal was met.

mod memory;
mod report;

use std::{
    path::PathBuf,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use aya::maps::{HashMap, Map, MapData};
use clap::Parser;
use proxy_common::{
    addr::Ipv4,
    service::{Frontend, Service},
};
use tests::{
    api::ApiServer,
    bench::{
        bounded::Taken,
        cluster::{self, Size},
        progress::tell,
        rounds::percentile,
        rules,
    },
    patience::wait_until,
    picture::Picture,
    sandbox::Sandbox,
};

use crate::{
    memory::Watcher,
    report::{Report, shown, shown_taken},
};

/// From the moment both lists were received until the kernel holds everything.
const COMPLETE: Duration = Duration::from_secs(2);
/// From a change of one endpoint until it is in the map, at the median.
const CHANGE: Duration = Duration::from_millis(5);
/// The same beside other ways of programming a node.
const SOON: Duration = Duration::from_millis(1);
/// Anonymous memory, in KiB.
const MEMORY: u64 = 60 * 1024;

/// For lists of hundreds of megabytes.
const PATIENCE: Duration = Duration::from_mins(5);

/// The agent against many Services.
#[derive(Debug, Parser)]
struct Cli {
    /// A tenth of the Services: to see that it works
    #[arg(long)]
    quick: bool,
    /// Where the figures go
    #[arg(long, default_value = "target/bench")]
    into: PathBuf,
    /// How many Services, 10,000 unless it is to be quick
    #[arg(long)]
    services: Option<u32>,
    /// How many endpoints each of them has
    #[arg(long, default_value_t = 10, overrides_with = "endpoints")]
    endpoints: u32,
    /// How many changes are measured
    #[arg(long, default_value_t = 200)]
    changes: u32,
    /// How connections are spread
    #[arg(long, default_value = "random")]
    algorithm: String,
    /// Also as rules, which may take no less than twenty times as long
    #[arg(long)]
    rules: bool,
    /// Seconds after which rules that are not loaded yet are given up: they took more than that
    #[arg(long, default_value_t = 120)]
    patience: u64,
    /// In pages, as from servers that have no streaming lists
    #[arg(long)]
    paged: bool,
}

impl Cli {
    fn size(&self) -> Size {
        let services = self.services.unwrap_or(if self.quick { 1_000 } else { 10_000 });
        Size { services, endpoints: self.endpoints, port: 8080 }
    }
}

fn main() -> ExitCode {
    match measure(&Cli::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn measure(cli: &Cli) -> Result<bool> {
    let size = cli.size();
    let sandbox = Sandbox::new()?;
    let server = server(&sandbox, cli)?;
    let agent = sandbox.agent(&["--master", &server.url(), "--algorithm", &cli.algorithm])?;
    let watcher = Watcher::of(agent.id());
    wait_until("the agent to be in sync", PATIENCE, || agent.log().contains("in sync").then_some(()))?;
    let peak = watcher.most();
    let settled = memory::settled(agent.id())?;
    let entries = check(&sandbox, &size.picture(|_| 0))?;
    let times = Times::of(&agent.log())?;
    let mut changes = changes(&sandbox, &server, cli)?;
    let peak_of_changes = watcher.most();
    let after = memory::settled(agent.id())?;
    check(&sandbox, &size.picture(|number| generation_after(number, cli)))?;

    let mut report =
        Report::new(format!("{} Services × {} endpoints, {}", size.services, size.endpoints, cli.algorithm));
    report.note("started → both lists received", shown(times.listing));
    report.time("both lists received → all in the kernel", times.complete, COMPLETE);
    report.note("entries equal to the objects", entries);
    changes.sort_unstable();
    let percentile = |percent| percentile(&changes, percent);
    report.time("change of an endpoint → in the map, median", percentile(50), CHANGE);
    report.note(&format!("change, 99 % of {}", changes.len()), shown(percentile(99)));
    report.note("change, worst", shown(percentile(100)));
    report.memory("anonymous memory, most until all was in the kernel", peak, MEMORY);
    report.memory("anonymous memory, settled", settled, MEMORY);
    report.memory("anonymous memory, most until after the changes", peak_of_changes, MEMORY);
    report.memory("anonymous memory, settled after the changes", after, MEMORY);
    if cli.rules {
        report.time("one change, median, to be next to nothing", percentile(50), SOON);
        report.case("Sluice", times.complete, Some(percentile(50)));
        compare(&mut report, size, times.complete, Duration::from_secs(cli.patience))?;
    }
    report.publish(&cli.into, if cli.rules { "programming" } else { "scale" })
}

/// Loads the same as rules, once with each program. What nftables takes, or has taken when it was ended, is what the agent is
/// held to.
fn compare(report: &mut Report, size: Size, complete: Duration, limit: Duration) -> Result<()> {
    for loader in &rules::LOADERS {
        tell(&format!("{}: loading the same", loader.name));
        let (cold, change) = loader.measure(size, limit)?;
        report.note(&format!("{}: the same", loader.name), shown_taken(cold));
        let shown_change = change.map_or_else(|| "not measured".to_owned(), shown_taken);
        report.note(&format!("{}: one change", loader.name), shown_change);
        let name = if cold.is_all() { loader.name.to_owned() } else { format!("{}, ended then", loader.name) };
        report.case(&name, cold.at_least(), change.map(Taken::at_least));
        if loader.name == "nft -f" {
            let times = cold.at_least().as_secs_f64() / complete.as_secs_f64();
            report.note("nft -f, times as long as the agent", format!("{times:.0}"));
            report.time("all in the kernel, beside nft", complete, cold.at_least() / 20);
        }
    }
    tell("");
    Ok(())
}

fn server(sandbox: &Sandbox, cli: &Cli) -> Result<ApiServer> {
    let server = sandbox.server()?;
    cli.size().objects().try_for_each(|object| server.apply(object))?;
    if cli.paged {
        server.refuse_streaming_lists();
    }
    Ok(server)
}

/// The kernel must hold what was asked for, or nothing was measured. Says how much that is.
fn check(sandbox: &Sandbox, expected: &Picture) -> Result<String> {
    let found = sandbox.picture()?;
    let differs = expected.iter().find(|(frontend, answers)| found.get(*frontend) != Some(answers));
    if let Some((frontend, answers)) = differs {
        anyhow::bail!("{frontend} is {:?} in the kernel, not {answers:?}", found.get(frontend));
    }
    ensure!(found.len() == expected.len(), "{} frontends in the kernel, not {}", found.len(), expected.len());
    let endpoints: usize = expected.values().map(|answers| answers.internal.len()).sum();
    Ok(format!("{} frontends, {endpoints} ways to endpoints", expected.len()))
}

/// How long it took, by the agent's own log.
struct Times {
    listing: Duration,
    complete: Duration,
}

impl Times {
    fn of(log: &str) -> Result<Self> {
        let moment = |line: &str| line.split_whitespace().next()?.parse::<jiff::Timestamp>().ok();
        let last = |words: &str| log.lines().filter(|line| line.contains(words)).filter_map(moment).max();
        let began = log.lines().find_map(moment).context("the agent says nothing")?;
        let listed = ["all Services are known", "all EndpointSlices are known"].map(last);
        let received = listed.into_iter().collect::<Option<Vec<_>>>().and_then(|lists| lists.into_iter().max());
        let received = received.context("the agent does not say when it knew the lists")?;
        let complete = last("in sync").context("the agent does not say when it was in sync")?;
        Ok(Self {
            listing: received.duration_since(began).try_into()?,
            complete: complete.duration_since(received).try_into()?,
        })
    }
}

/// Which Service a change is of: a large prime stride, so that neighbours in time are not neighbours in any table.
fn changed(turn: u32, cli: &Cli) -> u32 {
    turn * 7919 % cli.size().services
}

/// How often a Service was changed by all changes.
fn generation_after(number: u32, cli: &Cli) -> u32 {
    (0..cli.changes).filter(|turn| changed(*turn, cli) == number).count() as u32
}

/// Replaces an endpoint of one Service after the other, and measures until the kernel has it.
fn changes(sandbox: &Sandbox, server: &ApiServer, cli: &Cli) -> Result<Vec<Duration>> {
    let path = sandbox.pins.path().join("maps/SERVICES_V4");
    let map: HashMap<_, Frontend<Ipv4>, Service> = Map::HashMap(MapData::from_pin(path)?).try_into()?;
    let mut durations = Vec::new();
    let mut generations = std::collections::HashMap::new();
    for number in (0..cli.changes).map(|turn| changed(turn, cli)) {
        let generation = generations.entry(number).or_insert(0);
        *generation += 1;
        let (frontend, object) = (cluster::frontend(number), cli.size().slice(number, *generation));
        let before = map.get(&frontend, 0)?.internal;
        let began = Instant::now();
        server.apply(object)?;
        // Ranges are immutable: other content is another range.
        while map.get(&frontend, 0)?.internal == before {
            ensure!(began.elapsed() < PATIENCE, "the change of Service {number} is not in the map");
            thread::sleep(Duration::from_micros(50));
        }
        durations.push(began.elapsed());
    }
    ensure!(!durations.is_empty(), "no change was measured: --changes must not be 0");
    Ok(durations)
}
