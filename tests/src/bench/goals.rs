//! What the figures should be: ratios within one run, and one time.

use std::fmt;

use comfy_table::{Table, presets::UTF8_BORDERS_ONLY};
use serde_json::{Value, json};

use super::{
    case::{Case, Kind, SERVICES},
    course::Contestant,
    rounds::Figures,
    yardstick::Place,
};
use crate::frame::Family;

/// One of them.
#[derive(Clone, Debug)]
pub struct Goal {
    /// What should be.
    pub what: String,
    /// What it may be.
    pub bound: Bound,
    /// What it is; none if it was not measured.
    pub found: Option<f64>,
}

/// What a number may be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Bound {
    /// No more than this.
    AtMost(f64),
    /// No less.
    AtLeast(f64),
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtMost(most) => write!(f, "≤ {most:.2}"),
            Self::AtLeast(least) => write!(f, "≥ {least:.2}"),
        }
    }
}

impl Goal {
    /// Whether it was reached.
    pub fn is_met(&self) -> bool {
        self.found.is_some_and(|found| match self.bound {
            Bound::AtMost(most) => found <= most,
            Bound::AtLeast(least) => found >= least,
        })
    }

    /// In a word.
    pub fn verdict(&self) -> &'static str {
        match self.found {
            None => "not measured",
            Some(_) if self.is_met() => "met",
            Some(_) => "MISSED",
        }
    }

    /// For a file.
    pub fn value(&self) -> Value {
        json!({"goal": self.what, "found": self.found, "bound": self.bound.to_string(), "verdict": self.verdict()})
    }
}

/// Whether every goal that was measured was met, and at least one was.
pub fn are_met(goals: &[Goal]) -> bool {
    let mut measured = goals.iter().filter(|goal| goal.found.is_some()).peekable();
    measured.peek().is_some() && measured.all(Goal::is_met)
}

/// For people.
pub fn table(goals: &[Goal]) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_BORDERS_ONLY).set_header(["goal", "found", "bound", ""]);
    for goal in goals {
        let found = goal.found.map_or_else(String::new, |found| format!("{found:.2}"));
        table.add_row([goal.what.clone(), found, goal.bound.to_string(), goal.verdict().to_owned()]);
    }
    table
}

const KNOWN: [u32; 3] = [1, 1_000, 64_000];

/// All of them, with what was found.
pub fn judge(figures: &[Figures]) -> Vec<Goal> {
    let find = |case: Case| figures.iter().find(|figures| figures.case == case);
    let mut goals = Vec::new();
    let mut add = |what: String, most: f64, found: Option<f64>| {
        goals.push(Goal { what, bound: Bound::AtMost(most), found });
    };
    for (flows, bound) in KNOWN.into_iter().zip([0.35, 0.35, 0.45]) {
        let case = Case::new(Kind::Established, flows);
        add(format!("{case}: of the floor"), bound, find(case).map(Figures::ratio));
    }
    for flows in KNOWN {
        let (v4, v6) = (Case::new(Kind::Established, flows), Case::new(Kind::Established, flows).over(Family::V6));
        let ratio = find(v6).zip(find(v4)).map(|(v6, v4)| v6.ratio_to(v4));
        add(format!("{v6}: of IPv4"), 1.4, ratio);
    }
    let pass = Case::new(Kind::Pass, 1);
    add(format!("{pass}: nanoseconds"), 10.0, find(pass).map(|pass| pass.net(Contestant::Sluice)));
    let new = Case::new(Kind::New, 1);
    add(format!("{new}: of the floor"), 0.45, find(new).map(Figures::ratio));
    for flows in KNOWN {
        let (xdp, tc) = (Case::new(Kind::Established, flows), Case::new(Kind::Established, flows).at(Place::Tc));
        let ratio = find(tc).zip(find(xdp)).map(|(tc, xdp)| tc.ratio_to(xdp));
        add(format!("{tc}: of XDP"), 2.5, ratio);
    }
    // By the floor, which knows one Service only: the cases are not measured at the same time.
    let among = |services| find(Case::new(Kind::Established, 1_000).among(services));
    let [few, more @ ..] = SERVICES;
    for services in more {
        let ratio = among(services).zip(among(few)).map(|(more, few)| more.ratio() / few.ratio());
        add(format!("{}: of {few}", Case::new(Kind::Established, 1_000).among(services)), 1.1, ratio);
    }
    goals
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(case: Case, null: f64, floor: f64, sluice: f64) -> Figures {
        Figures { case, nanoseconds: [vec![null], vec![floor], vec![sluice]] }
    }

    #[test]
    fn a_goal_is_met_by_what_was_measured_and_by_nothing_else() {
        let v4 = Case::new(Kind::Established, 1);
        let v6 = v4.over(Family::V6);
        let goals = judge(&[figures(v4, 10.0, 110.0, 40.0), figures(v6, 10.0, 110.0, 55.0)]);
        let found =
            |what: &str| goals.iter().find(|goal| goal.what.starts_with(what)).map(|goal| (goal.found, goal.is_met()));
        assert_eq!(found("XDP IPv4 TCP known, 1 flow:"), Some((Some(0.3), true)));
        assert_eq!(found("XDP IPv6 TCP known, 1 flow:"), Some((Some(1.5), false)));
        assert_eq!(found("XDP IPv4 TCP known, 1k flows:"), Some((None, false)), "not measured");
    }

    #[test]
    fn what_should_be_large_is_met_from_its_bound_on() {
        let goal = |found| Goal { what: String::new(), bound: Bound::AtLeast(1.15), found };
        assert!(!goal(Some(1.14)).is_met() && goal(Some(1.15)).is_met() && !goal(None).is_met());
        let verdicts = [None, Some(1.0), Some(2.0)].map(|found| goal(found).verdict());
        assert_eq!(verdicts, ["not measured", "MISSED", "met"]);
    }

    #[test]
    fn goals_are_met_if_one_was_measured_and_none_missed() {
        let goals = |found: &[Option<f64>]| -> Vec<Goal> {
            found.iter().map(|found| Goal { what: String::new(), bound: Bound::AtMost(1.0), found: *found }).collect()
        };
        assert!(are_met(&goals(&[Some(0.5), None])));
        assert!(!are_met(&goals(&[Some(0.5), Some(1.5)])));
        assert!(!are_met(&goals(&[None])));
    }
}
