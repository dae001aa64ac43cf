//! Which tables a Service and its endpoints stand in.

use super::*;

/// Connections that are there keep an endpoint until it has left its slice, whatever has become of the Service.
#[test]
fn an_endpoint_stands_in_the_tables_of_its_family_whatever_addresses_its_service_has() {
    let of_ipv6 = |name: &str, service: &str, address: &str| {
        let mut slice = slice(name, service, &json!([ready(address)]));
        slice.address_type = "IPv6".into();
        slice
    };
    let slices = vec![
        slice("a", "web", &json!([ready("10.0.0.1")])),
        of_ipv6("b", "web", "2001:db8::1"),
        of_ipv6("c", "nobody", "2001:db8::2"),
        slice("d", "nobody", &json!([ready("10.0.0.2")])),
    ];
    let mut kernel = KernelState::default();
    let mut reconciler = reconciler(&kernel, SMALL);
    tell(&mut reconciler, lists(vec![service("web", json!({"clusterIP": "10.96.0.1"}))], slices));
    settle(&mut reconciler, &mut kernel, Instant::now());
    let tables = reconciler.tables();
    let v4: Vec<String> = tables.v4.backends.keys().map(|target| target.addr.to_string()).collect();
    let v6: Vec<String> = tables.v6.backends.keys().map(|target| target.addr.to_string()).collect();
    assert_eq!(
        (v4, v6),
        (vec!["10.0.0.1".into(), "10.0.0.2".into()], vec!["2001:db8::1".into(), "2001:db8::2".into()])
    );
    assert!(tables.v6.services.is_empty() && !tables.v4.services.is_empty());
    assert_equal(&kernel, tables);
}
