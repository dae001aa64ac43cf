//! Maglev hashing (Eisenbud et al., NSDI 2016, section 3.4): a table in which every endpoint has its share and which
//! changes little when one comes or goes. Nodes that know the same endpoints have the same table, so a client keeps its
//! endpoint even when a router sends its packets to another node.

use std::net::{IpAddr, SocketAddr};

use proxy_common::service::Pick;

use super::{Algorithm, Candidate, turns};

/// Table sizes, primes just below powers of two. Every doubling of the endpoints changes the size once, and with it the
/// whole table: established connections do not care, clients that rely on the hash alone do.
const SIZES: [u32; 11] = [251, 509, 1_021, 2_039, 4_093, 8_191, 16_381, 32_749, 65_521, 131_071, 262_139];

/// Slots per turn of a candidate, at least: shares differ by at most one slot of this many, and few of the others' slots
/// change when a candidate goes.
const SLOTS_PER_TURN: usize = 100;

/// Turns that fit into the largest table.
const TURNS: usize = 2_621;

/// The seeds of the two hashes. Other numbers would be other tables: two versions of Sluice in one cluster would disagree.
const SEEDS: [u64; 2] = [0x536c_7569_6365_0001, 0x536c_7569_6365_0002];

/// The connection's addresses and ports decide, or with affinity its client.
#[derive(Clone, Copy, Debug, Default)]
pub struct Maglev;

impl Algorithm for Maglev {
    fn fill(&self, candidates: &[Candidate]) -> Vec<usize> {
        if candidates.len() < 2 {
            return (0..candidates.len()).collect();
        }
        let turns = turns::list_within(candidates, TURNS);
        table(candidates, &turns, size(turns.len()))
    }

    fn pick(&self) -> Pick {
        Pick::Hash
    }
}

/// The smallest size with enough slots for every turn.
fn size(turns: usize) -> u32 {
    let [.., largest] = SIZES;
    SIZES.into_iter().find(|size| *size as usize >= turns * SLOTS_PER_TURN).unwrap_or(largest)
}

/// Candidates take turns, round after round; in a turn each takes the next free slot of its own permutation of all slots.
fn table(candidates: &[Candidate], turns: &[usize], size: u32) -> Vec<usize> {
    const FREE: usize = usize::MAX;
    let mut permutations: Vec<Permutation> =
        candidates.iter().map(|candidate| Permutation::of(candidate.address, size)).collect();
    let mut table = vec![FREE; size as usize];
    for index in turns.iter().copied().cycle().take(size as usize) {
        if let Some(slot) = permutations[index].find(|slot| table[*slot] == FREE) {
            table[slot] = index;
        }
    }
    table
}

/// The order in which a candidate asks for slots: every slot once, because the size is prime. It goes round for ever.
struct Permutation {
    next: u32,
    skip: u32,
    size: u32,
}

impl Permutation {
    fn of(address: SocketAddr, size: u32) -> Self {
        let [offset, skip] = SEEDS.map(|seed| hash(address, seed));
        Self { next: (offset % u64::from(size)) as u32, skip: (skip % u64::from(size - 1)) as u32 + 1, size }
    }
}

impl Iterator for Permutation {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        let slot = self.next;
        self.next = (slot + self.skip) % self.size;
        Some(slot as usize)
    }
}

/// FNV-1a over the bytes of address and port, and the finalizer of `MurmurHash3`, which spreads what differs in few bits.
fn hash(address: SocketAddr, seed: u64) -> u64 {
    const OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0100_0000_01b3;
    let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(PRIME);
    let port = address.port().to_be_bytes();
    let hash = match address.ip() {
        IpAddr::V4(v4) => v4.octets().iter().chain(&port).fold(OFFSET ^ seed, step),
        IpAddr::V6(v6) => v6.octets().iter().chain(&port).fold(OFFSET ^ seed, step),
    };
    let hash = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    let hash = (hash ^ (hash >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^ (hash >> 33)
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, net::SocketAddr};

    use super::{Maglev, SIZES};
    use crate::algorithm::{Algorithm as _, Candidate};

    fn candidates(count: usize, weight: impl Fn(usize) -> u32) -> Vec<Candidate> {
        let address = |index: usize| format!("10.1.{}.{}:8080", index / 250, index % 250 + 1).parse().unwrap();
        (0..count).map(|index| Candidate { address: address(index), weight: weight(index) }).collect()
    }

    fn table(candidates: &[Candidate]) -> Vec<SocketAddr> {
        Maglev.fill(candidates).into_iter().map(|index| candidates[index].address).collect()
    }

    fn percent(part: usize, whole: usize) -> f64 {
        let [part, whole] = [part, whole].map(|count| f64::from(u32::try_from(count).unwrap()));
        100.0 * part / whole
    }

    /// Percent of the table, by candidate.
    fn shares(table: &[SocketAddr]) -> BTreeMap<SocketAddr, f64> {
        let mut counts = BTreeMap::<_, usize>::new();
        for address in table {
            *counts.entry(*address).or_default() += 1;
        }
        counts.into_iter().map(|(address, count)| (address, percent(count, table.len()))).collect()
    }

    fn without<T: Clone>(items: &[T], index: usize) -> Vec<T> {
        [&items[..index], &items[index + 1..]].concat()
    }

    #[test]
    fn sizes_are_prime() {
        for size in SIZES {
            assert!((2..size).take_while(|factor| factor * factor <= size).all(|factor| size % factor != 0), "{size}");
        }
    }

    #[test]
    fn a_table_has_a_hundred_slots_per_endpoint_up_to_the_largest_size() {
        let found = [2, 5, 6, 10, 100, 1000, 2600, 5000].map(|count| table(&candidates(count, |_| 7)).len());
        assert_eq!(found, [251, 509, 1_021, 1_021, 16_381, 131_071, 262_139, 262_139]);
    }

    #[test]
    fn removing_one_of_a_hundred_moves_at_most_two_percent_of_the_others() {
        let all = candidates(100, |_| 1);
        let before = table(&all);
        for index in 0..all.len() {
            let after = table(&without(&all, index));
            assert_eq!(before.len(), after.len());
            let others = before.iter().zip(&after).filter(|(before, _)| **before != all[index].address);
            let moved = others.clone().filter(|(before, after)| before != after).count();
            let percent = percent(moved, others.count());
            assert!(percent <= 2.0, "{}: {percent} %", all[index].address);
        }
    }

    #[test]
    fn weights_are_kept_within_two_percent() {
        let cases = [("1:2:3", vec![1, 2, 3]), ("1:1:1:97", vec![1, 1, 1, 97]), ("of many", (1..=60).collect())];
        for (name, weights) in cases {
            let candidates = candidates(weights.len(), |index| weights[index]);
            let sum: u32 = weights.iter().sum();
            let shares = shares(&table(&candidates));
            for candidate in &candidates {
                let wanted = 100.0 * f64::from(candidate.weight) / f64::from(sum);
                let found = shares[&candidate.address];
                assert!((found - wanted).abs() <= 0.02 * wanted, "{name}: {found} % instead of {wanted} %");
            }
        }
    }

    #[test]
    fn equal_endpoints_have_equal_shares() {
        for count in [2, 3, 10, 100, 1000] {
            let shares = shares(&table(&candidates(count, |_| 1)));
            let (least, most) = shares
                .values()
                .fold((100.0, 0.0), |(least, most): (f64, f64), share| (least.min(*share), most.max(*share)));
            assert!(shares.len() == count && most / least <= 1.02, "{count}: {least} % to {most} %");
        }
    }

    #[test]
    fn the_table_is_the_same_everywhere_and_for_ever() {
        // Of another version or architecture, nodes would send the flows of one client to different endpoints.
        let found: Vec<usize> = Maglev.fill(&candidates(3, |_| 1)).into_iter().take(16).collect();
        assert_eq!(found, [0, 1, 1, 0, 1, 2, 0, 1, 2, 1, 0, 2, 2, 0, 1, 0]);
        let v6 = ["[fd00::1]:53", "[fd00::2]:53"].map(|text| Candidate { address: text.parse().unwrap(), weight: 1 });
        let found: Vec<usize> = Maglev.fill(&v6).into_iter().take(16).collect();
        assert_eq!(found, [0, 0, 1, 0, 1, 1, 0, 0, 1, 1, 1, 1, 0, 0, 0, 1]);
    }

    #[test]
    fn who_is_alone_or_absent_needs_no_table() {
        assert_eq!(Maglev.fill(&candidates(1, |_| 9)), [0]);
        assert!(Maglev.fill(&[]).is_empty());
    }
}
