//! `sluice top`: what goes on, by Service port or by backend, as it happens.

use std::{
    io::{self, IsTerminal as _},
    time::{Duration, Instant},
};

use clap::Args;
use ratatui::{
    DefaultTerminal, Frame,
    crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers},
    layout::{Constraint, Layout},
    style::{Modifier, Style},
    text::Line,
    widgets::{Row, Table},
};

use super::{
    Failure,
    output::{Format, Target, columns},
};
use crate::inspect::{Counts, Inspector, Rate, Rates};

const HEADINGS: [&str; 6] = ["NAME", "NEW/s", "PACKETS/s", "BYTES/s", "REPLIES/s", "REPLY BYTES/s"];

/// How to watch.
#[derive(Debug, Args)]
#[command(
    after_help = "Keys: b for backends, s for Services, q to end. Packets of translated sockets are not seen, only that they were opened.\n\nExamples:\n  sluice top\n  sluice top --once --backends\n  sluice top --interval 5 -o json"
)]
pub(super) struct Arguments {
    /// Seconds between two looks.
    #[arg(long, value_name = "SECONDS", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    interval: u16,
    /// Look twice, print what went on in between, and end. So does whatever is no terminal, or another form than a table.
    #[arg(long)]
    once: bool,
    /// By backend rather than by Service port.
    #[arg(long)]
    backends: bool,
    #[command(flatten)]
    target: Target,
}

pub(super) fn execute(arguments: &Arguments) -> Result<(), Failure> {
    let inspector = arguments.target.inspector()?;
    let interval = Duration::from_secs(arguments.interval.into());
    let is_live = arguments.target.output == Format::Table && io::stdout().is_terminal() && !arguments.once;
    if is_live {
        return Watch::begin(inspector, interval, arguments.backends)?.run();
    }
    let before = inspector.counts()?;
    std::thread::sleep(interval);
    let rates = inspector.counts()?.since(&before);
    arguments.target.show(&rates, |rates| plain(rates, arguments.backends))
}

fn plain(rates: &Rates, by_backend: bool) -> String {
    let rows = if by_backend { &rates.backends } else { &rates.services };
    columns(&HEADINGS, rows.iter().map(row), "Nothing goes on.")
}

fn row(rate: &Rate) -> [String; 6] {
    let Rate { name, opened, packets, bytes, reply_packets, reply_bytes } = rate;
    [name.clone(), short(*opened), short(*packets), short(*bytes), short(*reply_packets), short(*reply_bytes)]
}

/// With a letter for thousands, so that columns stay narrow.
fn short(number: f64) -> String {
    match number {
        0.0 => "0".to_owned(),
        ..10.0 => format!("{number:.1}"),
        ..10_000.0 => format!("{number:.0}"),
        ..10_000_000.0 => format!("{:.0}k", number / 1e3),
        ..10_000_000_000.0 => format!("{:.0}M", number / 1e6),
        _ => format!("{:.0}G", number / 1e9),
    }
}

/// The live view.
struct Watch {
    inspector: Inspector,
    interval: Duration,
    by_backend: bool,
    before: Counts,
    rates: Rates,
}

impl Watch {
    fn begin(inspector: Inspector, interval: Duration, by_backend: bool) -> Result<Self, Failure> {
        let before = inspector.counts()?;
        Ok(Self { inspector, interval, by_backend, before, rates: Rates::default() })
    }

    fn run(mut self) -> Result<(), Failure> {
        let mut terminal = ratatui::try_init().map_err(|error| Failure::new(error, 1))?;
        let ended = self.watch(&mut terminal);
        ratatui::restore();
        ended
    }

    fn watch(&mut self, terminal: &mut DefaultTerminal) -> Result<(), Failure> {
        loop {
            terminal.draw(|frame| self.draw(frame)).map_err(|error| Failure::new(error, 1))?;
            if self.wait().map_err(|error| Failure::new(error, 1))? {
                return Ok(());
            }
            let now = self.inspector.counts()?;
            self.rates = now.since(&self.before);
            self.before = now;
        }
    }

    /// Until the next look. Whether it is to end.
    fn wait(&mut self) -> io::Result<bool> {
        let deadline = Instant::now() + self.interval;
        while event::poll(deadline.saturating_duration_since(Instant::now()))? {
            let Event::Key(key) = event::read()? else { continue };
            if key.kind != KeyEventKind::Press {
                continue;
            }
            match key.code {
                KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return Ok(true),
                KeyCode::Char('q') | KeyCode::Esc => return Ok(true),
                KeyCode::Char('b') => self.by_backend = true,
                KeyCode::Char('s') => self.by_backend = false,
                _ => {}
            }
        }
        Ok(false)
    }

    fn draw(&self, frame: &mut Frame<'_>) {
        let [head, body] = Layout::vertical([Constraint::Length(1), Constraint::Fill(1)]).areas(frame.area());
        let rates = if self.by_backend { &self.rates.backends } else { &self.rates.services };
        let what = if self.by_backend { "backends" } else { "Services" };
        frame.render_widget(Line::raw(format!("{} busy {what}   b backends, s Services, q end", rates.len())), head);
        let widths = [Constraint::Fill(1), Constraint::Length(8)].into_iter().chain([Constraint::Length(14); 4]);
        let heading = Row::new(HEADINGS).style(Style::new().add_modifier(Modifier::BOLD));
        frame.render_widget(Table::new(rates.iter().map(|rate| Row::new(row(rate))), widths).header(heading), body);
    }
}

#[cfg(test)]
mod tests {
    use super::{plain, short};
    use crate::inspect::{Rate, Rates};

    #[test]
    fn rates_are_told_to_people_and_to_programs() {
        let rate = |name: &str, packets: f64| Rate {
            name: name.into(),
            opened: packets / 100.0,
            packets,
            bytes: packets * 1_000.0,
            reply_packets: packets / 2.0,
            reply_bytes: packets * 50.0,
        };
        let rates = Rates {
            seconds: 1.0,
            services: vec![rate("shop/web:http/TCP", 123_456.0), rate("shop/cart/TCP", 12.5)],
            backends: vec![rate("10.244.1.5:8080", 123_456.0)],
        };
        insta::assert_snapshot!("top", plain(&rates, false));
        insta::assert_snapshot!("top_backends", plain(&rates, true));
        insta::assert_snapshot!("top_json", serde_json::to_string_pretty(&rates).unwrap());
        assert_eq!(plain(&Rates::default(), false), "Nothing goes on.");
    }

    #[test]
    fn numbers_are_short() {
        let cases = [(0.0, "0"), (0.5, "0.5"), (12.4, "12"), (9_999.0, "9999"), (12_345.0, "12k"), (3.2e7, "32M")];
        for (number, expected) in cases {
            assert_eq!(short(number), expected);
        }
    }
}
