//! Plans that were carried out in part.

use std::time::Instant;

use serde_json::json;

use super::{SMALL, assert_equal, lists, ready, reconciler, service, settle, slice, tell};
use crate::diff::{KernelState, Plan};

/// Trap 20: wherever a sync breaks off, the next one finds out what is missing, because it compares levels and not events.
#[test]
fn what_a_sync_that_failed_left_undone_is_done_by_the_next() {
    let before = || {
        let services =
            vec![service("one", json!({"clusterIP": "10.96.0.1"})), service("old", json!({"clusterIP": "10.96.0.9"}))];
        let slices =
            vec![slice("a", "one", &json!([ready("10.0.0.1")])), slice("o", "old", &json!([ready("10.0.0.9")]))];
        lists(services, slices)
    };
    let after = || {
        let one = json!({"clusterIP": "10.96.0.1", "sessionAffinity": "ClientIP"});
        let services = vec![service("one", one), service("two", json!({"clusterIP": "10.96.0.2"}))];
        let slices = vec![
            slice("a", "one", &json!([ready("10.0.0.1"), ready("10.0.0.2")])),
            slice("b", "two", &json!([ready("10.0.0.2"), ready("10.0.0.3")])),
        ];
        lists(services, slices)
    };
    let steps_of = |world: &mut super::Reconciler| world.plan(Instant::now()).0;
    let start = || {
        let mut kernel = KernelState::default();
        let mut world = reconciler(&kernel, SMALL);
        tell(&mut world, before());
        settle(&mut world, &mut kernel, Instant::now());
        tell(&mut world, after());
        (world, kernel)
    };
    let whole = steps_of(&mut start().0);
    assert!(whole.v4.len() > 6, "{whole:?}");
    for done in 0..=whole.v4.len() {
        let (mut world, mut kernel) = start();
        let plan = steps_of(&mut world);
        kernel.carry_out(&Plan { v4: plan.v4[..done].to_vec(), ..Plan::default() });
        world.adopt(kernel.clone(), Instant::now());
        settle(&mut world, &mut kernel, Instant::now());
        assert_equal(&kernel, world.tables());
    }
}
