//! A range of ports, as the operator writes it.

use std::{fmt, num::ParseIntError, ops::RangeInclusive, str::FromStr};

/// A range of ports, both ends included, none of them 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortRange(pub RangeInclusive<u16>);

/// Why text is not a [`PortRange`].
#[derive(Debug, thiserror::Error)]
pub enum PortRangeError {
    /// Not two parts.
    #[error("expected FIRST-LAST, as in 30000-32767")]
    Form,
    /// Not a port.
    #[error("not a port: {0}")]
    Number(#[from] ParseIntError),
    /// Nothing in it, or 0.
    #[error("the first port must not be 0 nor above the last")]
    Empty,
}

impl FromStr for PortRange {
    type Err = PortRangeError;

    fn from_str(text: &str) -> Result<Self, PortRangeError> {
        let (first, last) = text.split_once('-').ok_or(PortRangeError::Form)?;
        let range = first.trim().parse()?..=last.trim().parse()?;
        if *range.start() == 0 || range.is_empty() {
            return Err(PortRangeError::Empty);
        }
        Ok(Self(range))
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.0.start(), self.0.end())
    }
}

impl PortRange {
    /// An eighth of it, 256 ports at least, apart from the rest; half, where it has less than twice as many.
    pub fn split(&self) -> (RangeInclusive<u16>, RangeInclusive<u16>) {
        let (first, last) = (*self.0.start(), *self.0.end());
        let count = last - first;
        let apart = (count / 8).max(255).min(count / 2);
        let border = last - apart;
        (first..=border.saturating_sub(1).max(first), border..=last)
    }

    /// Whether a port is in both.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.0.start() <= other.0.end() && other.0.start() <= self.0.end()
    }
}

#[cfg(test)]
mod tests {
    use super::PortRange;

    #[test]
    fn an_eighth_of_a_range_is_set_apart() {
        let cases = [
            (10_000..=29_999, (10_000..=27_499, 27_500..=29_999)),
            (10_000..=10_999, (10_000..=10_743, 10_744..=10_999)),
            (10_000..=10_099, (10_000..=10_049, 10_050..=10_099)),
            (7..=7, (7..=7, 7..=7)),
        ];
        for (range, expected) in cases {
            assert_eq!(PortRange(range).split(), expected);
        }
    }

    #[test]
    fn a_range_has_a_first_and_a_last_port() {
        assert_eq!("30000-32767".parse::<PortRange>().unwrap(), PortRange(30000..=32767));
        for nonsense in ["30000", "2-1", "0-5", "1-65536", "a-b", ""] {
            assert!(nonsense.parse::<PortRange>().is_err(), "{nonsense}");
        }
    }

    #[test]
    fn ranges_overlap_if_they_share_a_port() {
        let node_ports = PortRange(30000..=32767);
        for (other, expected) in [
            (PortRange(10000..=29999), false),
            (PortRange(10000..=30000), true),
            (PortRange(31000..=31001), true),
            (PortRange(32767..=40000), true),
            (PortRange(32768..=40000), false),
            (PortRange(1..=65535), true),
        ] {
            assert_eq!((node_ports.overlaps(&other), other.overlaps(&node_ports)), (expected, expected), "{other}");
        }
    }
}
