//! Weights as numbers of turns: the smallest whole numbers in the same ratio, up to a bound.

use super::Candidate;

/// Slots a list may have, or four for each candidate: the ratio of the weights is as exact as that allows.
const SLOTS: usize = 1024;

/// Each candidate as many times as its weight asks for, evenly mixed; each once when all weigh the same.
pub(super) fn list(candidates: &[Candidate]) -> Vec<usize> {
    list_within(candidates, SLOTS.max(4 * candidates.len()))
}

/// The same, in no more than `bound` slots or one for each candidate.
pub(super) fn list_within(candidates: &[Candidate], bound: usize) -> Vec<usize> {
    let turns = turns(candidates, bound as u64);
    // The nth of a candidate's turns is in the middle of the nth part of the round.
    let positions = |(index, turns): (usize, &u64)| {
        let turns = *turns;
        (0..turns).map(move |turn| (index, 2 * turn + 1, turns))
    };
    let mut round: Vec<(usize, u64, u64)> = turns.iter().enumerate().flat_map(positions).collect();
    round.sort_by(|(_, middle, turns), (_, other_middle, other_turns)| {
        (middle * other_turns).cmp(&(other_middle * turns))
    });
    round.into_iter().map(|(index, ..)| index).collect()
}

/// How many turns each candidate has, at least one. The sum is at most `bound` or the number of candidates, whichever is
/// more.
fn turns(candidates: &[Candidate], bound: u64) -> Vec<u64> {
    let divisor = candidates.iter().fold(0, |divisor, candidate| greatest_common_divisor(divisor, candidate.weight));
    let weights = || candidates.iter().map(|candidate| u64::from(candidate.weight / divisor.max(1)));
    let sum: u64 = weights().sum();
    let room = bound.saturating_sub(candidates.len() as u64);
    let scaled = |weight: u64| if sum <= bound { weight } else { 1 + weight * room / sum };
    weights().map(scaled).collect()
}

fn greatest_common_divisor(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::list;
    use crate::algorithm::Candidate;

    fn candidates(weights: &[u32]) -> Vec<Candidate> {
        let address = |index: usize| format!("10.0.{}.{}:80", index / 256, index % 256).parse().unwrap();
        weights
            .iter()
            .enumerate()
            .map(|(index, weight)| Candidate { address: address(index), weight: *weight })
            .collect()
    }

    #[test]
    fn a_list_has_the_smallest_numbers_in_the_ratio_of_the_weights_and_mixes_them() {
        let cases: [(&str, &[u32], &[usize]); 6] = [
            ("none", &[], &[]),
            ("one", &[7], &[0]),
            ("equal", &[5, 5, 5], &[0, 1, 2]),
            ("reduced", &[20, 10], &[0, 1, 0]),
            ("mixed", &[5, 1, 1], &[0, 0, 0, 1, 2, 0, 0]),
            ("in order", &[1, 2, 1], &[1, 0, 2, 1]),
        ];
        for (name, weights, expected) in cases {
            assert_eq!(list(&candidates(weights)), expected, "{name}");
        }
    }

    #[test]
    fn a_list_is_bounded_and_leaves_nobody_out() {
        let cases: [(&str, Vec<u32>); 4] = [
            ("coprime", vec![1, 997, 991]),
            ("a giant", vec![1, u32::MAX]),
            ("giants", vec![u32::MAX, u32::MAX - 1]),
            ("many", (1..=3000).collect()),
        ];
        for (name, weights) in cases {
            let candidates = candidates(&weights);
            let list = list(&candidates);
            assert!(list.len() <= 1024.max(4 * weights.len()), "{name}: {}", list.len());
            assert!((0..weights.len()).all(|index| list.contains(&index)), "{name}");
        }
    }
}
