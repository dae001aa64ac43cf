//! Ports that have no endpoint where their Service wants one are counted.

use serde_json::{Value, json};

use super::{SMALL, lists, ready, reconciler, service, settle, slice, tell};
use crate::{
    desired::NoLocal,
    diff::KernelState,
    source::{Change, Event},
};

const LOCAL: &str = "Local";
const CLUSTER: &str = "Cluster";

fn here(address: &str) -> Value {
    json!({"addresses": [address], "nodeName": "here"})
}

fn spec(internal: &str, external: &str, node_port: u16) -> Value {
    json!({
        "clusterIPs": ["10.96.0.1"], "internalTrafficPolicy": internal, "externalTrafficPolicy": external,
        "ports": [{"port": 80, "nodePort": node_port}],
    })
}

#[test]
fn a_port_is_counted_by_the_policy_that_leaves_its_clients_without_an_endpoint() {
    let draining = json!({
        "addresses": ["10.0.0.1"], "nodeName": "here",
        "conditions": {"ready": false, "serving": true, "terminating": true},
    });
    let unready = json!({"addresses": ["10.0.0.1"], "conditions": {"ready": false, "serving": false}});
    let cases = [
        ("both policies, endpoints elsewhere", spec(LOCAL, LOCAL, 30080), json!([ready("10.0.0.1")]), (1, 1)),
        ("internal alone", spec(LOCAL, CLUSTER, 30080), json!([ready("10.0.0.1")]), (1, 0)),
        ("external alone", spec(CLUSTER, LOCAL, 30080), json!([ready("10.0.0.1")]), (0, 1)),
        ("not reachable from outside", spec(LOCAL, LOCAL, 0), json!([ready("10.0.0.1")]), (1, 0)),
        ("no policy", spec(CLUSTER, CLUSTER, 30080), json!([ready("10.0.0.1")]), (0, 0)),
        ("one here", spec(LOCAL, LOCAL, 30080), json!([ready("10.0.0.1"), here("10.0.0.2")]), (0, 0)),
        ("one that drains here", spec(LOCAL, LOCAL, 30080), json!([draining]), (0, 0)),
        ("none anywhere", spec(LOCAL, LOCAL, 30080), json!([]), (0, 0)),
        ("none that answers", spec(LOCAL, LOCAL, 30080), json!([unready]), (0, 0)),
    ];
    for (case, spec, endpoints, (internal, external)) in cases {
        let mut kernel = KernelState::default();
        let mut reconciler = reconciler(&kernel, SMALL);
        let now = std::time::Instant::now();
        tell(&mut reconciler, lists(vec![service("web", spec)], vec![slice("web-1", "web", &endpoints)]));
        settle(&mut reconciler, &mut kernel, now);
        assert_eq!(reconciler.no_local(), [NoLocal { internal, external }, NoLocal::default()], "{case}");
        // Computed anew it is not counted twice, and gone it is not counted.
        tell(&mut reconciler, [Event::EndpointSlices(Change::Replace(vec![]))]);
        settle(&mut reconciler, &mut kernel, now);
        tell(&mut reconciler, [Event::EndpointSlices(Change::Replace(vec![slice("web-1", "web", &endpoints)]))]);
        settle(&mut reconciler, &mut kernel, now);
        assert_eq!(reconciler.no_local()[0], NoLocal { internal, external }, "{case}, again");
        tell(&mut reconciler, [Event::Services(Change::Replace(vec![]))]);
        settle(&mut reconciler, &mut kernel, now);
        assert_eq!(reconciler.no_local()[0], NoLocal::default(), "{case}, without the Service");
    }
}
