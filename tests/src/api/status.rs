//! Errors, with the bodies a real server gives them.

use axum::{
    body::Body,
    http::{StatusCode, header},
    response::Response,
};
use serde_json::{Value, json};

/// The object that stands for an error, in a body or in a watch event.
pub(super) fn object(code: u16, reason: &str, message: &str) -> Value {
    json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": reason, "code": code,
    })
}

pub(super) fn not_found(path: &str) -> Response {
    response(404, &object(404, "NotFound", &format!("the server could not find the requested resource ({path})")))
}

pub(super) fn bad_request(error: &anyhow::Error) -> Response {
    response(400, &object(400, "BadRequest", &format!("{error:#}")))
}

/// What an object gets that breaks a rule.
pub(super) fn invalid(message: &str) -> Response {
    response(422, &object(422, "Invalid", message))
}

/// What a streaming list gets from a server without them.
pub(super) fn no_streaming_lists() -> Response {
    let message = "ListOptions.meta.k8s.io \"\" is invalid: sendInitialEvents: Forbidden: sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled";
    response(422, &object(422, "Invalid", message))
}

pub(super) fn expired(message: &str) -> Response {
    response(410, &object(410, "Expired", message))
}

/// A refusal that was asked for.
pub(super) fn refusal(code: u16) -> Response {
    let (reason, message) = match code {
        401 => ("Unauthorized", "Unauthorized"),
        403 => ("Forbidden", "forbidden: User \"system:serviceaccount:kube-system:sluice\" cannot list resource"),
        410 => ("Expired", "too old resource version: 1 (9390)"),
        429 => ("TooManyRequests", "Too many requests, please try again later."),
        _ => ("InternalError", "Internal error occurred"),
    };
    let mut response = response(code, &object(code, reason, message));
    if code == 429 {
        response.headers_mut().insert(header::RETRY_AFTER, header::HeaderValue::from_static("1"));
    }
    response
}

pub(super) fn response(code: u16, value: &Value) -> Response {
    let mut response = Response::new(Body::from(format!("{value}\n")));
    *response.status_mut() = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
    response
}
