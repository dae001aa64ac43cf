{{/* What everything of this chart is called by. */}}
{{- define "sluice.selector" -}}
app.kubernetes.io/name: sluice
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "sluice.labels" -}}
{{ include "sluice.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- end -}}

{{- define "sluice.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Where probes ask: the pod's own address, unless the agent listens at one alone. */}}
{{- define "sluice.probeHost" -}}
{{- if not (has .Values.health.address (list "0.0.0.0" "[::]")) -}}
{{ .Values.health.address | trimPrefix "[" | trimSuffix "]" }}
{{- end -}}
{{- end -}}

{{/* The label `job` of the agents' series, as the Prometheus operator makes it if nobody tells it otherwise. */}}
{{- define "sluice.job" -}}
{{- if .Values.prometheus.rules.job -}}
{{ .Values.prometheus.rules.job }}
{{- else if .Values.prometheus.serviceMonitor.enabled -}}
sluice-metrics
{{- else if .Values.prometheus.podMonitor.enabled -}}
{{ .Release.Namespace }}/sluice
{{- else -}}
{{- fail "prometheus.rules needs prometheus.podMonitor, prometheus.serviceMonitor, or the label of the agents' series: prometheus.rules.job" }}
{{- end -}}
{{- end -}}
