//! What a kernel found wrong with packets.

use anyhow::Result;

use crate::traffic::place::Place;

/// Counters of wrong checksums of a place that are not zero, both families.
pub fn checksum_errors(place: &Place) -> Result<Vec<String>> {
    let texts = place
        .namespace()
        .run(|| ["snmp", "snmp6"].map(|name| std::fs::read_to_string(format!("/proc/thread-self/net/{name}"))))?;
    let [v4, v6] = texts;
    let (v4, v6) = (v4?, v6?);
    let lines: Vec<_> = v4.lines().collect();
    let tables = lines.chunks(2).filter_map(|pair| Some((pair.first()?, pair.get(1)?)));
    let v4 = tables.flat_map(|(names, values)| names.split_whitespace().zip(values.split_whitespace()));
    let v6 = v6.lines().filter_map(|line| line.split_once(char::is_whitespace));
    let errors = v4.chain(v6).filter(|(name, value)| name.contains("CsumErrors") && value.trim() != "0");
    Ok(errors.map(|(name, value)| format!("{name} {}", value.trim())).collect())
}
