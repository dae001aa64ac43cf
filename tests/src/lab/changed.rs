//! Services of the lab with what their fixture has no words for.

use std::path::Path;

use anyhow::Result;
use serde_json::{Value, json};

use super::{
    address::of_balancer,
    manifest::{Service, write_documents},
};

/// Writes a Service and its slices as [`Service::write`] does, with the Service's object changed before.
pub fn write_changed(directory: &Path, service: &Service, change: impl FnOnce(&mut Value)) -> Result<()> {
    let mut documents = service.documents();
    change(&mut documents[0]);
    write_documents(directory, &format!("{}.yaml", service.name), &documents)
}

/// Makes a Service one of type `LoadBalancer`, whose balancer has the addresses with that last part.
pub fn balance(object: &mut Value, host: u8) {
    let addresses = of_balancer(host);
    object["spec"]["type"] = json!("LoadBalancer");
    object["status"] = json!({ "loadBalancer": { "ingress": [{ "ip": addresses.v4 }, { "ip": addresses.v6 }] } });
}
