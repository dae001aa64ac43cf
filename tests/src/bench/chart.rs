//! Bars, as SVG: one group per case, one bar in it per series. In go the figures of a part of the bench; out comes a file beside them.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};
use plotters::prelude::*;
use serde_json::Value;

/// What a part of the bench has to show.
#[derive(Clone, Debug)]
pub struct Chart {
    title: &'static str,
    series: &'static [&'static str],
    groups: Vec<(String, Vec<f64>)>,
    /// Where bars begin, if lengths are those of logarithms.
    least: Option<f64>,
}

const WIDTH: u32 = 960;
const NAMES: i32 = 320;
const NUMBERS: i32 = 90;
const TOP: i32 = 60;
const BAR: i32 = 14;
const GAP: i32 = 8;
const COLOURS: [RGBColor; 3] = [RGBColor(0x9a, 0xa5, 0xb1), RGBColor(0x1f, 0x77, 0xb4), RGBColor(0xd9, 0x7b, 0x29)];

impl Chart {
    /// Of a part's figures; none for parts that are numbers against limits alone.
    pub fn of(part: &str, figures: &Value) -> Option<Self> {
        let (title, series, keys, least): (_, &[&str], &[&str], _) = match part {
            "cost" => ("nanoseconds per packet", &["floor", "Sluice"], &["floor", "sluice"], None),
            "pps" => ("packets per second of a processor", &["arrived"], &["rate"], None),
            "connect" => ("TCP connections per second of a processor", &["connections"], &["rate"], None),
            "programming" => {
                ("milliseconds, every gap ten times", &["everything", "one change"], &["cold", "change"], Some(0.01))
            }
            _ => return None,
        };
        let cases = figures["cases"].as_array()?;
        let group = |case: &Value| {
            // What was not measured has no bar.
            let numbers: Vec<f64> = keys.iter().map_while(|key| case[*key].as_f64()).collect();
            (!numbers.is_empty()).then_some((case["case"].as_str()?.to_owned(), numbers))
        };
        Some(Self { title, series, groups: cases.iter().filter_map(group).collect(), least })
    }

    /// As a document.
    pub fn svg(&self) -> Result<String> {
        let mut text = String::new();
        let root = SVGBackend::with_string(&mut text, (WIDTH, self.height().unsigned_abs())).into_drawing_area();
        self.draw(&root).map_err(|error| anyhow::anyhow!("cannot draw: {error}"))?;
        drop(root);
        Ok(text)
    }

    fn height(&self) -> i32 {
        TOP + self.groups.len() as i32 * self.group_height() + GAP
    }

    fn group_height(&self) -> i32 {
        self.series.len() as i32 * BAR + GAP
    }

    fn draw<B: DrawingBackend>(&self, root: &DrawingArea<B, plotters::coord::Shift>) -> Outcome<B> {
        root.fill(&WHITE)?;
        root.draw(&Text::new(self.title, (GAP, GAP), ("sans-serif", 22)))?;
        for (index, (name, colour)) in self.series.iter().zip(COLOURS).enumerate() {
            let left = GAP + index as i32 * 120;
            root.draw(&Rectangle::new([(left, 36), (left + 10, 46)], colour.filled()))?;
            root.draw(&Text::new(*name, (left + 16, 35), ("sans-serif", 16)))?;
        }
        for (index, group) in self.groups.iter().enumerate() {
            self.draw_group(root, TOP + index as i32 * self.group_height(), group)?;
        }
        root.present()
    }

    fn draw_group<B: DrawingBackend>(
        &self,
        root: &DrawingArea<B, plotters::coord::Shift>,
        top: i32,
        (name, numbers): &(String, Vec<f64>),
    ) -> Outcome<B> {
        root.draw(&Text::new(name.clone(), (GAP, top + 1), ("sans-serif", 16)))?;
        for (index, (number, colour)) in numbers.iter().zip(COLOURS).enumerate() {
            let top = top + index as i32 * BAR;
            let right = NAMES + self.length(*number);
            root.draw(&Rectangle::new([(NAMES, top), (right, top + BAR - 2)], colour.filled()))?;
            root.draw(&Text::new(shown(*number), (right + 6, top), ("sans-serif", 15)))?;
        }
        Ok(())
    }

    /// Of a bar: the longest one takes all the room there is.
    fn length(&self, number: f64) -> i32 {
        let most = self.groups.iter().flat_map(|(_, numbers)| numbers).copied().fold(f64::MIN_POSITIVE, f64::max);
        let share = match self.least {
            None => number / most,
            Some(least) => (number / least).log10() / (most / least).log10(),
        };
        (share.clamp(0.0, 1.0) * f64::from(WIDTH.cast_signed() - NAMES - NUMBERS)).round() as i32
    }
}

type Outcome<B> = Result<(), DrawingAreaErrorKind<<B as DrawingBackend>::ErrorType>>;

fn shown(number: f64) -> String {
    match number {
        1e6.. => format!("{:.2} million", number / 1e6),
        1e3.. => format!("{:.0} thousand", number / 1e3),
        100.0.. => format!("{number:.0}"),
        _ => format!("{number:.2}"),
    }
}

/// Draws a part's figures into `PART.svg`, if there is something to draw.
pub fn write(directory: &Path, part: &str, figures: &Value) -> Result<()> {
    let Some(chart) = Chart::of(part, figures) else { return Ok(()) };
    let file = directory.join(format!("{part}.svg"));
    fs::write(&file, chart.svg()?).with_context(|| format!("cannot write {}", file.display()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn widths(svg: &str, colour: &str) -> Vec<i32> {
        let of_bar = |line: &&str| line.starts_with("<rect") && line.contains(colour) && !line.contains("y=\"36\"");
        let width = |line: &str| line.split_once("width=\"")?.1.split('"').next()?.parse().ok();
        svg.lines().filter(of_bar).filter_map(width).collect()
    }

    #[test]
    fn bars_are_as_long_as_numbers_are_large() {
        let figures = json!({"cases": [
            {"case": "one <flow>", "floor": 100.0, "sluice": 50.0}, {"case": "many", "floor": 25.0, "sluice": 10.0}]});
        let svg = Chart::of("cost", &figures).unwrap().svg().unwrap();
        assert!(svg.starts_with("<svg") && svg.contains("one &lt;flow&gt;"), "{svg}");
        let (floor, sluice) = (widths(&svg, "#9AA5B1"), widths(&svg, "#1F77B4"));
        assert_eq!((floor.len(), sluice.len()), (2, 2), "{svg}");
        for (one, other, times) in [(floor[0], sluice[0], 2), (floor[0], floor[1], 4), (floor[0], sluice[1], 10)] {
            assert!((one - other * times).abs() <= times, "{one} is not {times} times {other}");
        }
    }

    #[test]
    fn a_step_of_a_logarithm_is_ten_times_the_number() {
        let cases = [("a", 0.1), ("b", 1.0), ("c", 10.0)]
            .map(|(case, number)| json!({"case": case, "cold": number, "change": number}));
        let chart = Chart::of("programming", &json!({"cases": cases})).unwrap();
        let [a, b, c] = [0.1, 1.0, 10.0].map(|number| chart.length(number));
        assert!((b - a - (c - b)).abs() <= 1 && b > a, "{a} {b} {c}");
    }

    #[test]
    fn what_was_not_measured_has_no_bar() {
        let cases = [json!({"case": "a", "cold": 1.0, "change": null}), json!({"case": "b", "cold": null})];
        let chart = Chart::of("programming", &json!({"cases": cases})).unwrap();
        assert_eq!(chart.groups, [("a".to_owned(), vec![1.0])]);
    }

    #[test]
    fn the_file_is_beside_the_figures_and_there_is_none_of_limits() {
        let directory = tempfile::tempdir().unwrap();
        let figures = json!({"cases": [{"case": "XDP_TX", "rate": 1e6}]});
        write(directory.path(), "pps", &figures).unwrap();
        write(directory.path(), "scale", &figures).unwrap();
        assert!(fs::read_to_string(directory.path().join("pps.svg")).unwrap().contains("1.00 million"));
        assert!(!directory.path().join("scale.svg").exists());
    }
}
