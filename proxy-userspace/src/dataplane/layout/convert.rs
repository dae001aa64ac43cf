//! Entries of one layout as entries of another: what has the same name in both is taken over, what only the new one has is zero or what
//! [`DEFAULTS`] says, and what only the old one has is left out. The numbers in maps have their low bytes first, so that one that has
//! become longer keeps its value, and so does one that has become shorter if there is room for it.

use super::{Fields, MapFields};

/// What fields of values are that a layout before did not have, where zeros would be wrong: map, field, bytes.
const DEFAULTS: [(&str, &str, &[u8]); 0] = [];

/// Bytes that go from one place to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Move {
    from: usize,
    to: usize,
    size: usize,
}

/// How keys, or values, become those of another layout.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Side {
    moves: Vec<Move>,
    /// What there is where nothing is moved to.
    template: Vec<u8>,
}

/// How a map's entries become those of another layout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::dataplane) struct Conversion {
    key: Side,
    value: Side,
}

impl Conversion {
    /// From one layout of a map to another.
    pub(in crate::dataplane) fn new(map: &str, from: &MapFields, to: &MapFields) -> Self {
        Self::with_defaults(from, to, |name| {
            DEFAULTS.iter().find(|(of, field, _)| *of == map && *field == name).map(|(_, _, bytes)| *bytes)
        })
    }

    fn with_defaults<'a>(from: &MapFields, to: &MapFields, default: impl Fn(&str) -> Option<&'a [u8]>) -> Self {
        Self { key: Side::new(&from.key, &to.key, |_| None), value: Side::new(&from.value, &to.value, default) }
    }

    /// Adds a key as it is in the other layout.
    pub(in crate::dataplane) fn add_key(&self, key: &[u8], to: &mut Vec<u8>) {
        self.key.add(key, to);
    }

    /// Adds a value as it is in the other layout.
    pub(in crate::dataplane) fn add_value(&self, value: &[u8], to: &mut Vec<u8>) {
        self.value.add(value, to);
    }
}

impl Side {
    fn new<'a>(from: &Fields, to: &Fields, default: impl Fn(&str) -> Option<&'a [u8]>) -> Self {
        let mut side = Self { moves: Vec::new(), template: vec![0; to.size()] };
        for field in &to.0 {
            if let Some(known) = from.get(&field.name) {
                side.add_move(Move { from: known.offset, to: field.offset, size: known.size.min(field.size) });
            } else if let Some(bytes) = default(&field.name) {
                let place = side.template.iter_mut().skip(field.offset).take(field.size);
                place.zip(bytes).for_each(|(place, byte)| *place = *byte);
            }
        }
        side
    }

    /// Neighbours that stay neighbours go together.
    fn add_move(&mut self, next: Move) {
        match self.moves.last_mut() {
            Some(last) if last.from + last.size == next.from && last.to + last.size == next.to => {
                last.size += next.size;
            }
            _ => self.moves.push(next),
        }
    }

    fn add(&self, bytes: &[u8], to: &mut Vec<u8>) {
        let start = to.len();
        to.extend_from_slice(&self.template);
        for Move { from, to: place, size } in &self.moves {
            // Of a map whose entries are shorter than it says, nothing is taken.
            if let Some(bytes) = bytes.get(*from..from + size) {
                to[start + place..start + place + size].copy_from_slice(bytes);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::{Conversion, Fields, MapFields};
    use crate::dataplane::layout::Field;

    fn fields(sizes: &[(&str, usize)]) -> Fields {
        let mut offset = 0;
        let place = |(name, size): &(&str, usize)| {
            offset += size;
            Field { name: (*name).to_owned(), offset: offset - size, size: *size }
        };
        Fields(sizes.iter().map(place).collect())
    }

    fn value(from: &[(&str, usize)], to: &[(&str, usize)], bytes: &[u8]) -> Vec<u8> {
        let of = |sizes| MapFields { key: Fields::default(), value: fields(sizes) };
        let default = |name: &str| (name == "new.rate").then_some(&[7_u8, 0][..]);
        let mut converted = Vec::new();
        Conversion::with_defaults(&of(from), &of(to), default).add_value(bytes, &mut converted);
        converted
    }

    #[test]
    fn fields_are_found_by_name_wherever_they_are() {
        assert_eq!(value(&[("a", 1), ("b", 2)], &[("b", 2), ("a", 1)], &[1, 2, 3]), [2, 3, 1]);
    }

    #[test]
    fn what_is_new_is_zero_or_its_default_and_what_is_gone_is_left_out() {
        assert_eq!(value(&[("a", 1), ("gone", 1)], &[("new.rate", 2), ("a", 1), ("pad", 1)], &[5, 6]), [7, 0, 5, 0]);
    }

    #[test]
    fn a_number_keeps_its_value_in_more_bytes_and_in_fewer() {
        let wide = value(&[("n", 2)], &[("n", 4)], &0x1234_u16.to_le_bytes());
        assert_eq!(wide, 0x1234_u32.to_le_bytes());
        assert_eq!(value(&[("n", 4)], &[("n", 2)], &wide), 0x1234_u16.to_le_bytes());
    }

    #[test]
    fn an_entry_that_is_too_short_gives_what_it_has() {
        assert_eq!(value(&[("a", 1), ("b", 4)], &[("b", 4), ("a", 1)], &[9, 1]), [0, 0, 0, 0, 9]);
    }

    type Sizes = Vec<(&'static str, usize)>;

    /// Some of these fields, in some order.
    fn layout() -> impl Strategy<Value = Sizes> {
        let all: Sizes = vec![("a", 1), ("b", 2), ("c.x", 4), ("c.y", 4), ("d.0", 16), ("d.1", 16), ("pad", 3)];
        (proptest::sample::subsequence(all.clone(), 0..=all.len())).prop_shuffle()
    }

    proptest! {
        /// An upgrade and the way back keep all that both versions know, and forget the rest.
        #[test]
        fn there_and_back_keeps_what_both_know(one in layout(), other in layout(), seed in any::<[u8; 46]>()) {
            let size = one.iter().map(|(_, size)| size).sum::<usize>();
            let before = &seed[..size];
            let there = value(&one, &other, before);
            prop_assert_eq!(there.len(), other.iter().map(|(_, size)| size).sum::<usize>());
            let back = value(&other, &one, &there);
            let known: BTreeMap<_, _> = other.into_iter().collect();
            for Field { name, offset, size } in fields(&one).0 {
                let range = offset..offset + size;
                if known.contains_key(name.as_str()) {
                    prop_assert_eq!(&back[range.clone()], &before[range], "{}", name);
                } else {
                    prop_assert!(back[range].iter().all(|byte| *byte == 0), "{}", name);
                }
            }
        }
    }
}
