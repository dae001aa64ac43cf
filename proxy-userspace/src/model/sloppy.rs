//! Addresses and ranges as Go has read them until it began to refuse leading zeros: objects that were stored before may have some, and
//! kube-proxy reads them as decimal numbers (`k8s.io/utils/net`, `ParseIPSloppy`).

use std::net::IpAddr;

use ipnet::IpNet;

/// An address.
pub(super) fn address(text: &str) -> Option<IpAddr> {
    text.parse().ok().or_else(|| without_zeros(text)?.parse().ok())
}

/// A range of addresses.
pub(super) fn range(text: &str) -> Option<IpNet> {
    text.parse().ok().or_else(|| {
        let (address, length) = text.split_once('/')?;
        format!("{}/{length}", without_zeros(address)?).parse().ok()
    })
}

/// An IPv4 address without leading zeros.
fn without_zeros(text: &str) -> Option<String> {
    let numbers = text.split('.').map(|number| {
        let is_number = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
        is_number.then(|| number.trim_start_matches('0')).map(|number| if number.is_empty() { "0" } else { number })
    });
    Some(numbers.collect::<Option<Vec<_>>>()?.join("."))
}

#[cfg(test)]
mod tests {
    use super::{address, range};

    #[test]
    fn leading_zeros_are_passed_over() {
        let cases = [
            ("010.1.2.3", Some("10.1.2.3")),
            ("10.000.02.030", Some("10.0.2.30")),
            ("10.1.2.3", Some("10.1.2.3")),
            ("2001:db8::1", Some("2001:db8::1")),
            ("10.1.2", None),
            ("10..2.3", None),
            ("10.1.2.0400", None),
            ("0x10.1.2.3", None),
            ("", None),
        ];
        for (text, expected) in cases {
            assert_eq!(address(text), expected.map(|expected| expected.parse().unwrap()), "{text}");
        }
    }

    #[test]
    fn so_are_those_of_ranges() {
        assert_eq!(range("010.0.0.0/8"), "10.0.0.0/8".parse().ok());
        assert_eq!(range("fd00::/8"), "fd00::/8".parse().ok());
        assert_eq!(range("010.0.0.0"), None);
    }
}
