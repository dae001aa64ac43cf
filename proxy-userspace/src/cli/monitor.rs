//! `sluice monitor`: a line for each thing that happens, as it happens. It is the only command that asks anything of the programs:
//! to tell it, for as long as it runs.

use std::{
    io::{self, Write as _},
    time::Duration,
};

use clap::Args;
use ipnet::IpNet;
use jiff::{Timestamp, tz::TimeZone};
use tokio::{
    signal::unix::{SignalKind, signal},
    time::{self, MissedTickBehavior},
};

use super::{
    Failure,
    flow::{Protocol, network},
    output::{Format, Target},
};
use crate::{
    dataplane::{Watch, WatchError},
    inspect::{Event, EventFilter, EventKind, HookName, Inspector, Roster},
};

/// What to show of what happens.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  sluice monitor\n  sluice monitor --event drop,reject --service default/web\n  sluice monitor --address 10.244.1.7 --for 60 -o json"
)]
pub(super) struct Arguments {
    /// Of a Service: NAME, NAMESPACE/NAME or NAMESPACE/NAME:PORT.
    #[arg(short, long, value_name = "SERVICE")]
    service: Option<String>,
    /// From or to an address, or one in a network; a backend's counts, too.
    #[arg(short, long, value_name = "NETWORK", value_parser = network)]
    address: Option<IpNet>,
    /// With that port at one end.
    #[arg(short, long, value_name = "PORT")]
    port: Option<u16>,
    /// Of a protocol.
    #[arg(long, value_enum)]
    protocol: Option<Protocol>,
    /// Outcomes by their names, or by the first word of these: drop, reject, reset, refuse, pass.
    #[arg(short, long, value_name = "EVENT", value_delimiter = ',')]
    event: Vec<EventKind>,
    /// Hooks, as metrics name them: `pod_in`, `uplink_xdp`, connect, …
    #[arg(long, value_name = "HOOK", value_delimiter = ',')]
    hook: Vec<HookName>,
    /// End after so many lines.
    #[arg(short, long, value_name = "NUMBER")]
    count: Option<u64>,
    /// End after so many seconds.
    #[arg(long = "for", value_name = "SECONDS")]
    seconds: Option<u64>,
    #[command(flatten)]
    target: Target,
}

pub(super) fn execute(arguments: &Arguments) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|error| Failure::new(error, 1))?.block_on(Monitor::new(arguments)?.run(arguments))
}

impl From<WatchError> for Failure {
    fn from(error: WatchError) -> Self {
        let code = match error {
            WatchError::Silent { .. } => super::EX_CONFIG,
            _ => 1,
        };
        Self::new(error, code)
    }
}

impl Arguments {
    fn filter(&self) -> EventFilter {
        EventFilter {
            service: self.service.clone(),
            address: self.address,
            port: self.port,
            protocol: self.protocol.map(Into::into),
            events: self.event.clone(),
            hooks: self.hook.clone(),
        }
    }
}

/// Whether there is to be more.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Then {
    GoOn,
    End,
}

/// What becomes of records.
struct Monitor {
    inspector: Inspector,
    roster: Roster,
    filter: EventFilter,
    format: Format,
    /// Lines that may still be written.
    left: u64,
}

impl Monitor {
    fn new(arguments: &Arguments) -> Result<Self, Failure> {
        let inspector = arguments.target.inspector()?;
        Ok(Self {
            roster: Roster::read(&inspector)?,
            inspector,
            filter: arguments.filter(),
            format: arguments.target.output,
            left: arguments.count.unwrap_or(u64::MAX),
        })
    }

    /// Until a signal, or as much as was asked for.
    async fn run(mut self, arguments: &Arguments) -> Result<(), Failure> {
        let failure = |error: io::Error| Failure::new(error, 1);
        let mut interrupted = signal(SignalKind::interrupt()).map_err(failure)?;
        let mut terminated = signal(SignalKind::terminate()).map_err(failure)?;
        let mut watch = Watch::begin(&arguments.target.pin_path)?;
        let mut renewal = time::interval(Watch::RENEWAL);
        renewal.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let end = time::sleep(arguments.seconds.map_or(Duration::MAX, Duration::from_secs));
        tokio::pin!(end);
        if self.left == 0 || self.begin()? == Then::End {
            return Ok(());
        }
        loop {
            let then = tokio::select! {
                biased;
                _ = interrupted.recv() => Then::End,
                _ = terminated.recv() => Then::End,
                () = &mut end => Then::End,
                _ = renewal.tick() => renew(&mut watch)?,
                events = watch.next() => self.show(&events?)?,
            };
            if then == Then::End {
                return Ok(());
            }
        }
    }

    fn begin(&self) -> Result<Then, Failure> {
        if self.format == Format::Table { write(&heading()) } else { Ok(Then::GoOn) }
    }

    fn show(&mut self, records: &[proxy_common::event::Event]) -> Result<Then, Failure> {
        self.roster.refresh(&self.inspector)?;
        let booted = booted();
        for record in records {
            let event = Event::new(record, &self.roster, booted).filter(|event| self.filter.fits(event));
            let Some(event) = event else { continue };
            self.left -= 1;
            if write(&text(&event, self.format)?)? == Then::End || self.left == 0 {
                return Ok(Then::End);
            }
        }
        Ok(Then::GoOn)
    }
}

/// A line, or a document of YAML.
fn text(event: &Event, format: Format) -> Result<String, Failure> {
    match format {
        Format::Table => Ok(line(event, TimeZone::system())),
        Format::Json => serde_json::to_string(event).map_err(|error| Failure::new(error, 1)),
        Format::Yaml => serde_saphyr::to_string(event)
            .map(|text| format!("---\n{}", text.trim_end()))
            .map_err(|error| Failure::new(error, 1)),
    }
}

/// Has the programs go on, and says what they had no room for.
fn renew(watch: &mut Watch) -> Result<Then, Failure> {
    watch.renew().map_err(WatchError::from)?;
    let lost = watch.lost().map_err(WatchError::from)?;
    if lost > 0 {
        eprintln!("sluice: {lost} events were lost: there were more than could be read");
    }
    Ok(Then::GoOn)
}

/// When the node was started, as its clock has it now.
fn booted() -> Timestamp {
    let up = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Timestamp::now() - Duration::try_from(up).unwrap_or_default()
}

/// Writes a line at once: somebody waits for it. Who has seen enough has closed the pipe.
fn write(line: &str) -> Result<Then, Failure> {
    let mut out = io::stdout().lock();
    match writeln!(out, "{line}").and_then(|()| out.flush()) {
        Ok(()) => Ok(Then::GoOn),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(Then::End),
        Err(error) => Err(Failure::new(error, 1)),
    }
}

/// Columns that are as wide as what mostly stands in them: what comes later is not known yet.
fn columns([time, hook, event, protocol, way, service]: [&str; 6]) -> String {
    format!("{time:<15} {hook:<15} {event:<22} {protocol:<8} {way} {service}").trim_end().to_owned()
}

fn heading() -> String {
    columns(["TIME", "HOOK", "EVENT", "PROTOCOL", "SOURCE > DESTINATION (BACKEND)", "SERVICE"])
}

fn line(event: &Event, zone: TimeZone) -> String {
    let time = event.time.to_zoned(zone).strftime("%H:%M:%S%.6f").to_string();
    let name = |end: &Option<_>| end.as_ref().map_or_else(|| "-".to_owned(), ToString::to_string);
    let backend = event.backend.map(|backend| format!(" ({backend})")).unwrap_or_default();
    let way = format!("{} > {}{backend}", name(&event.source), name(&event.destination));
    let service = event.service.as_ref().map(ToString::to_string).unwrap_or_default();
    columns([&time, &event.hook, &event.event, event.protocol.as_deref().unwrap_or("-"), &way, &service])
}

#[cfg(test)]
mod tests {
    use jiff::tz::TimeZone;

    use super::{heading, line, text};
    use crate::{
        cli::output::Format,
        inspect::{End, Event, opened},
    };

    #[test]
    fn programs_are_told_the_same() {
        insta::assert_snapshot!(text(&opened(), Format::Json).unwrap());
        insta::assert_snapshot!(text(&opened(), Format::Yaml).unwrap());
    }

    #[test]
    fn a_line_says_who_talks_to_whom_by_which_name() {
        let socket = Event { hook: "connect".into(), source: None, ..opened() };
        let six = |text: &str| Some(End { address: text.parse().unwrap(), port: 53 });
        let dropped = Event {
            hook: "uplink_xdp".into(),
            event: "drop_unallocated".into(),
            protocol: Some("UDP".into()),
            source: six("2001:db8::7"),
            destination: six("2001:db8:96::99"),
            backend: None,
            service: None,
            ..opened()
        };
        let tagged = Event {
            hook: "uplink_in".into(),
            event: "pass_vlan".into(),
            protocol: None,
            source: None,
            destination: None,
            backend: None,
            service: None,
            ..opened()
        };
        let lines = [opened(), socket, dropped, tagged].map(|event| line(&event, TimeZone::UTC));
        let expected = [
            "00:00:00.000000 pod_in          opened                 TCP      10.244.1.7:4000 > 10.96.0.10:80 (10.244.2.5:8080) default/web:http",
            "00:00:00.000000 connect         opened                 TCP      - > 10.96.0.10:80 (10.244.2.5:8080) default/web:http",
            "00:00:00.000000 uplink_xdp      drop_unallocated       UDP      [2001:db8::7]:53 > [2001:db8:96::99]:53",
            "00:00:00.000000 uplink_in       pass_vlan              -        - > -",
        ];
        assert_eq!(lines, expected);
        assert!(heading().starts_with("TIME            HOOK            EVENT                  PROTOCOL SOURCE"));
    }
}
