{{/* Start of the names of all objects: at most 40 characters, since -operator and the like follow. */}}
{{- define "motet.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Labels that select pods of a component: (list . "gateway"). They can never change. */}}
{{- define "motet.selectorLabels" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: motet
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{/* Metadata of an object: (list . "gateway" "-gateway") is component and what follows the start of the name. */}}
{{- define "motet.metadata" -}}
{{- $root := index . 0 -}}
name: {{ include "motet.fullname" $root }}{{ index . 2 }}
namespace: {{ $root.Release.Namespace }}
labels:
  {{- include "motet.labels" (list $root (index . 1)) | nindent 2 }}
{{- end -}}

{{/* All labels of an object: (list . "gateway"). */}}
{{- define "motet.labels" -}}
{{- $root := index . 0 -}}
{{ include "motet.selectorLabels" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
{{- with $root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "motet.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ default $.Chart.AppVersion .tag }}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* ServiceAccounts that engines serve, as namespace/name, with commas between. */}}
{{- define "motet.trustedServiceAccounts" -}}
{{- $own := printf "%s/%s-" .Release.Namespace (include "motet.fullname" .) -}}
{{- concat (list (printf "%sgateway" $own) (printf "%soperator" $own)) .Values.engine.trustedServiceAccounts | join "," -}}
{{- end -}}

{{- define "motet.tlsSecretName" -}}
{{- default (printf "%s-tls" (include "motet.fullname" .)) .Values.tlsSecretName -}}
{{- end -}}

{{/* What follows `metadata:` in a custom resource definition, before its name. */}}
{{- define "motet.crdMetadata" -}}
labels:
  {{- include "motet.labels" (list . "crds") | nindent 2 }}
{{- if .Values.crds.keep }}
annotations:
  helm.sh/resource-policy: keep
{{- end }}
{{- end -}}

{{/* Annotations of what engines stand on: where resources outlive the release, engines do, and this must too. */}}
{{- define "motet.keptWithResources" -}}
{{- if .Values.crds.keep -}}
annotations:
  helm.sh/resource-policy: keep
{{- end -}}
{{- end -}}
