{{- define "layertap.name" -}}
{{- if contains "layertap" .Release.Name }}{{ .Release.Name | trunc 50 | trimSuffix "-" }}{{ else }}{{ printf "%s-layertap" (.Release.Name | trunc 41) }}{{ end }}
{{- end }}

{{- define "layertap.selector" -}}
app.kubernetes.io/name: layertap
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "layertap.labels" -}}
{{ include "layertap.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "layertap.toml" -}}
[server]
host = "0.0.0.0"  # the pod's own address
log_format = "json"
threads = {{ .Values.threads }}
grace_seconds = {{ .Values.graceSeconds }}
{{- with .Values.tls }}
{{- if .secret }}
tls_cert = "/etc/layertap/tls/tls.crt"
tls_key = "/etc/layertap/tls/tls.key"
{{- if .clientCa }}
tls_client_ca = "/etc/layertap/tls/ca.crt"
{{- end }}
{{- end }}
{{- end }}
{{- with .Values.tokens }}
{{- if .secret }}
extract_tokens_file = "/etc/layertap/tokens/extract"
{{- if .admin }}
admin = true
admin_tokens_file = "/etc/layertap/tokens/admin"
{{- end }}
{{- end }}
{{- end }}
{{- with .Values.server }}
{{ . | trim }}
{{- end }}

{{ .Values.models | trim }}
{{- end }}
