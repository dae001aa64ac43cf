//! Rounds: every contestant runs every case in each of them, so that what disturbs a round disturbs all. What counts is the
//! median over rounds.

use std::{collections::BTreeSet, time::Duration};

use anyhow::Result;

use super::{
    case::{Case, Kind},
    course::{Contestant, Course},
    restored::Traffic,
};

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// How often everybody has a turn.
    pub rounds: u32,
    /// How long a turn is.
    pub turn: Duration,
}

/// More new flows than any table has room for.
const FILLING: u32 = 300_000;
/// Packets for a first guess.
const GUESS: u32 = 20_000;

/// What was found in one case.
#[derive(Clone, Debug)]
pub struct Figures {
    /// The case.
    pub case: Case,
    /// Nanoseconds per packet, round by round, of each contestant, with what restoring and calling cost.
    pub nanoseconds: [Vec<f64>; 3],
}

impl Figures {
    /// Nanoseconds of a contestant alone, at the median.
    pub fn net(&self, contestant: Contestant) -> f64 {
        median(self.nets(contestant).collect())
    }

    fn nets(&self, contestant: Contestant) -> impl Iterator<Item = f64> {
        let null = &self.nanoseconds[Contestant::Null as usize];
        self.nanoseconds[contestant as usize].iter().zip(null).map(|(all, null)| all - null)
    }

    /// How much of the floor's time the agent's program takes, in the same round, at the median.
    pub fn ratio(&self) -> f64 {
        median(
            self.nets(Contestant::Sluice).zip(self.nets(Contestant::Floor)).map(|(own, floor)| own / floor).collect(),
        )
    }

    /// How much of the time of another case this one takes.
    pub fn ratio_to(&self, other: &Self) -> f64 {
        let own = self.nets(Contestant::Sluice);
        median(own.zip(other.nets(Contestant::Sluice)).map(|(own, other)| own / other).collect())
    }

    /// How far the ratios of single rounds are from each other: the largest less the smallest.
    pub fn spread(&self) -> f64 {
        let ratios: Vec<f64> =
            self.nets(Contestant::Sluice).zip(self.nets(Contestant::Floor)).map(|(own, floor)| own / floor).collect();
        let (least, most) =
            ratios.iter().fold((f64::MAX, f64::MIN), |(least, most), ratio| (least.min(*ratio), most.max(*ratio)));
        most - least
    }
}

/// The middle of numbers; that of none is not a number.
pub fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    let middle = numbers.len() / 2;
    match numbers.as_slice() {
        [] => f64::NAN,
        numbers if numbers.len() % 2 == 1 => numbers[middle],
        numbers => f64::midpoint(numbers[middle - 1], numbers[middle]),
    }
}

/// The number, of sorted ones, that so many in a hundred do not exceed; that of none is nought.
pub fn percentile<T: Copy + Default>(sorted: &[T], percent: usize) -> T {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or_default()
}

/// Measures all cases: first those whose flows are known, because new ones drive them out of the floor's only table; last those
/// with many Services, which stay.
pub fn measure(
    course: &mut Course<'_>,
    cases: &[Case],
    effort: Effort,
    mut tell: impl FnMut(&str),
) -> Result<Vec<Figures>> {
    let stages: BTreeSet<_> = cases.iter().map(order).collect();
    let mut figures = Vec::new();
    for this in stages {
        let cases: Vec<Case> = cases.iter().copied().filter(|case| order(case) == this).collect();
        course.set_services(this.0)?;
        figures.extend(stage(course, &cases, effort, &mut tell)?);
    }
    Ok(figures)
}

fn order(case: &Case) -> (u32, bool) {
    (case.services, case.kind == Kind::New)
}

fn stage(course: &mut Course<'_>, cases: &[Case], effort: Effort, tell: &mut impl FnMut(&str)) -> Result<Vec<Figures>> {
    let mut entries = Vec::new();
    for case in cases {
        tell(&format!("{case}: making its flows"));
        entries.push(Entry::new(course, *case, effort)?);
    }
    for round in 0..effort.rounds {
        for entry in &mut entries {
            tell(&format!("round {} of {}: {}", round + 1, effort.rounds, entry.figures.case));
            entry.round(course, round)?;
        }
    }
    Ok(entries.into_iter().map(|entry| entry.figures).collect())
}

/// A case with its packets, for each contestant.
struct Entry {
    turns: [(Contestant, Traffic, u32); 3],
    figures: Figures,
}

impl Entry {
    fn new(course: &mut Course<'_>, case: Case, effort: Effort) -> Result<Self> {
        let mut turn = |contestant| -> Result<_> {
            let traffic = course.traffic(case, contestant)?;
            if case.kind == Kind::New {
                course.repeat(case, contestant, &traffic, FILLING)?;
            }
            let guess = course.repeat(case, contestant, &traffic, GUESS.max(case.flows))?.nanoseconds;
            #[expect(clippy::cast_sign_loss, reason = "a time is not negative")]
            let count = (effort.turn.as_secs_f64() * 1e9 / guess) as u32;
            // A turn is all flows' turn.
            Ok((contestant, traffic, count.max(case.flows).max(GUESS)))
        };
        let turns = [turn(Contestant::Null)?, turn(Contestant::Floor)?, turn(Contestant::Sluice)?];
        Ok(Self { turns, figures: Figures { case, nanoseconds: [vec![], vec![], vec![]] } })
    }

    /// One turn for each, another one being the first every time.
    fn round(&mut self, course: &mut Course<'_>, round: u32) -> Result<()> {
        let first = round as usize % self.turns.len();
        for (contestant, traffic, count) in self.turns.iter().cycle().skip(first).take(self.turns.len()) {
            let case = self.figures.case;
            // So that the caches hold what is this one's.
            course.repeat(case, *contestant, traffic, (count / 20).max(case.flows))?;
            let runs = course.repeat(case, *contestant, traffic, *count)?;
            self.figures.nanoseconds[*contestant as usize].push(runs.nanoseconds);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(null: &[f64], floor: &[f64], sluice: &[f64]) -> Figures {
        let nanoseconds = [null.to_vec(), floor.to_vec(), sluice.to_vec()];
        Figures { case: Case::new(Kind::Established, 1), nanoseconds }
    }

    #[test]
    fn a_machine_that_is_half_as_fast_in_one_round_changes_no_ratio() {
        let steady = figures(&[10.0; 3], &[70.0; 3], &[40.0; 3]);
        let uneven = figures(&[10.0, 20.0, 10.0], &[70.0, 140.0, 70.0], &[40.0, 80.0, 40.0]);
        assert!((steady.ratio() - 0.5).abs() < 1e-9);
        assert!((uneven.ratio() - 0.5).abs() < 1e-9);
        assert!(uneven.spread() < 1e-9);
    }

    #[test]
    fn one_round_that_was_disturbed_does_not_count() {
        let disturbed = figures(&[10.0; 3], &[70.0; 3], &[40.0, 400.0, 40.0]);
        assert!((disturbed.ratio() - 0.5).abs() < 1e-9);
        assert!((disturbed.net(Contestant::Sluice) - 30.0).abs() < 1e-9);
        assert!(disturbed.spread() > 5.0);
    }

    #[test]
    fn the_median_of_an_even_number_is_between_the_two_in_the_middle() {
        assert!((median(vec![4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < 1e-9);
        assert!(median(vec![]).is_nan());
    }

    #[test]
    fn a_percentile_is_one_of_the_numbers() {
        let numbers: Vec<u32> = (1..=200).collect();
        assert_eq!([0, 50, 99, 100].map(|percent| percentile(&numbers, percent)), [1, 100, 198, 200]);
        assert_eq!(percentile(&[7], 99), 7);
        assert_eq!(percentile::<u32>(&[], 50), 0);
    }
}
